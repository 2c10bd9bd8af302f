"""Duplicates: the components of the graph of near pairs, whatever the blocks, ranks, restarts; who is kept; leaks."""

import networkx
import numpy as np
import pytest
import torch

from dinov3_train.curation import dedup as module
from dinov3_train.curation.dedup import DedupSettings, Duplicates, Groups, ImageSet, dedup
from dinov3_train.curation.kmeans import Where


def quiet(_: str) -> None:
    pass


def planted(unit, count: int = 120, dim: int = 24, seed: int = 0) -> np.ndarray:
    """Random rows of which every third has a near copy, some of them copies of copies."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dim))
    for number in range(3, count, 3):
        rows[number] = rows[rng.integers(0, number)] + 0.1 * rng.standard_normal(dim)
    return unit(rows)


def components(rows: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """Groups by brute force in float64."""
    full = rows.astype(np.float64)
    full /= np.linalg.norm(full, axis=1, keepdims=True)
    graph = networkx.Graph(zip(*np.nonzero(np.triu(full @ full.T >= threshold, 1))))
    return {frozenset(int(node) for node in group) for group in networkx.connected_components(graph)}


def as_sets(groups: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups == number).tolist()) for number in set(groups[groups >= 0].tolist())}


@pytest.mark.parametrize("block", [7, 50, 4096])
@pytest.mark.parametrize("threshold", [0.8, 0.95, 0.99])
def test_groups_are_connected_components(unit, write_pool, tmp_path, block, threshold):
    rows = planted(unit)
    found = dedup(
        [ImageSet("pool", write_pool(tmp_path / "pool", rows))],
        DedupSettings(threshold=threshold, block=block),
        tmp_path / "out",
        where=Where(),
        say=quiet,
    )
    expected = components(rows, threshold)
    assert as_sets(found.groups("pool")) == expected
    kept = set(found.kept("pool").tolist())
    assert all(len(kept & group) == 1 for group in expected)
    assert found.summary["dropped"] == sum(len(group) - 1 for group in expected) == len(rows) - len(kept)
    table = found.table().to_pylist()
    assert len(table) == sum(len(group) for group in expected)
    for entry in table:
        assert entry["name"] == f"/pool/{entry['row']}.jpg"
        first = next(e for e in table if e["group"] == entry["group"])
        cosine = float(rows[entry["row"]].astype(np.float64) @ rows[first["row"]].astype(np.float64))
        assert entry["similarity"] == pytest.approx(cosine, abs=2e-3)


def test_pairs_at_the_threshold_are_decided_exactly(unit, write_pool, tmp_path):
    """Pairs a hair above and below it, which products in bf16 cannot tell apart."""
    rng = np.random.default_rng(0)
    first = unit(rng.standard_normal((200, 32)))
    second = unit(first + 0.35 * rng.standard_normal((200, 32)) / 32**0.5)
    rows = np.concatenate([first, second])
    full = rows.astype(np.float64)
    full /= np.linalg.norm(full, axis=1, keepdims=True)
    threshold = float(np.median((full[:200] * full[200:]).sum(axis=1)))
    found = dedup(
        [ImageSet("pool", write_pool(tmp_path / "pool", rows))],
        DedupSettings(threshold=threshold, block=64),
        tmp_path / "out",
        where=Where(),
        say=quiet,
    )
    assert as_sets(found.groups("pool")) == components(rows, threshold)
    assert 95 <= found.summary["groups"] <= 105


def test_equal_files_are_one_group_however_they_embed(unit, write_pool, tmp_path):
    rows = unit(np.random.default_rng(0).standard_normal((6, 24)))
    hashes = ["a", "b", "a", "c", "b", "a"]
    found = dedup(
        [ImageSet("pool", write_pool(tmp_path / "pool", rows, hashes=hashes, sides=[1, 1, 1, 1, 5, 1]))],
        DedupSettings(threshold=1.0),
        tmp_path / "out",
        where=Where(),
        say=quiet,
    )
    assert found.groups("pool").tolist() == [0, 1, 0, -1, 1, 0]
    assert found.kept("pool").tolist() == [0, 3, 4]  # the first; of b the one of more pixels
    assert found.summary["duplicates_of_equal_content"] == 3


def test_a_pool_of_one_image_and_near_copies_of_it(unit, write_pool, tmp_path):
    rng = np.random.default_rng(0)
    rows = unit(np.ones((1500, 8)) + 0.001 * rng.standard_normal((1500, 8)))
    found = dedup(
        [ImageSet("pool", write_pool(tmp_path / "pool", rows))],
        DedupSettings(threshold=0.99, block=400),
        tmp_path / "out",
        where=Where(),
        say=quiet,
    )
    assert found.kept("pool").tolist() == [0]
    assert found.summary["largest_group"] == 1500


def three_sets(unit, write_pool, tmp_path):
    """Two pools, a trusted set and a held-out set that share directions 0 to 9."""
    base = np.random.default_rng(0).standard_normal((30, 24))

    def near(name, numbers, sides):
        noise = np.random.default_rng(ord(name)).standard_normal((len(numbers), 24))
        hashes = [f"{name}{number}" for number in range(len(numbers))]
        return write_pool(tmp_path / name, unit(base[numbers] + 0.02 * noise), sides=sides, hashes=hashes)

    return [
        ImageSet("first", near("a", [0, 1, 2, 3, 10], [9, 9, 1, 1, 1])),
        ImageSet("second", near("b", [0, 2, 4, 5, 11], [1, 9, 1, 1, 1])),
        ImageSet("good", near("c", [1, 4, 12, 12], [1, 1, 1, 2]), "trusted"),
        ImageSet("test", near("d", [3, 5, 13, 13, 12], [1] * 5), "held-out"),
    ]


def test_who_is_kept_across_sets(unit, write_pool, tmp_path):
    sets = three_sets(unit, write_pool, tmp_path)
    found = dedup(sets, DedupSettings(threshold=0.97), tmp_path / "out", where=Where(), say=quiet)
    assert found.kept("first").tolist() == [0, 4]  # 0 has more pixels; 1 is trusted's, 2 second's, 3 the test's
    assert found.kept("second").tolist() == [1, 4]
    assert found.kept("good").tolist() == [0, 1]  # both 12 are in the test
    assert found.summary["leaks"] == 4
    leaks = {(entry["set"], entry["row"]) for entry in found.table().to_pylist() if entry["leak"]}
    assert leaks == {("first", 3), ("second", 3), ("good", 2), ("good", 3)}
    with pytest.raises(ValueError, match="knows first, second, good, test, not third"):
        found.kept("third")


def test_ranks_are_one(unit, write_pool, tmp_path, on_ranks):
    sets = three_sets(unit, write_pool, tmp_path)
    settings = DedupSettings(threshold=0.97, block=3)
    alone = dedup(sets, settings, tmp_path / "one", where=Where(), say=quiet)
    found = on_ranks(3, lambda c: dedup(sets, settings, tmp_path / "two", where=Where(collectives=c), say=quiet))
    for each in found:
        assert each.summary == alone.summary
        assert each.table().equals(alone.table())
        for name in ("first", "second", "good"):
            assert np.array_equal(each.kept(name), alone.kept(name))
    assert not list((tmp_path / "two").glob("state_*"))


def test_killed_and_continued(unit, write_pool, tmp_path, monkeypatch):
    """Every block of rows is done once, and the result is that of a search never stopped."""
    rows = planted(unit)
    sets, settings = [ImageSet("pool", write_pool(tmp_path / "pool", rows))], DedupSettings(threshold=0.95, block=20)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dedup(sets, settings, tmp_path / "out", where=Where(progress=stop), say=quiet)
    assert seen[-1] == (15, 21)  # 6 + 5 + 4 of 6 + 5 + ... + 1
    seen.clear()
    found = dedup(sets, settings, tmp_path / "out", where=Where(progress=lambda *each: seen.append(each)), say=quiet)
    assert seen[-1] in ((10, 10), (6, 6))  # the third line of blocks was under way, or done and not yet kept
    assert as_sets(found.groups("pool")) == components(rows, 0.95)
    again = dedup(sets, settings, tmp_path / "out", where=Where(progress=None), say=quiet)
    assert again.summary == found.summary


def test_a_damaged_state_is_done_again(unit, write_pool, tmp_path):
    rows = planted(unit)
    sets, settings = [ImageSet("pool", write_pool(tmp_path / "pool", rows))], DedupSettings(threshold=0.95)
    dedup(sets, settings, tmp_path / "out", where=Where(), say=quiet)
    (tmp_path / "out" / "summary.json").unlink()
    (tmp_path / "out" / "state_0.npz").write_bytes(b"PK half")
    said: list[str] = []
    found = dedup(sets, settings, tmp_path / "out", where=Where(), say=said.append)
    assert "its work is done again" in said[0]
    assert as_sets(found.groups("pool")) == components(rows, 0.95)


def test_wrong_input(unit, write_pool, tmp_path):
    rows = planted(unit)
    one = write_pool(tmp_path / "pool", rows)
    other = write_pool(tmp_path / "other", rows[:, :8])
    settings = DedupSettings(threshold=0.9)
    with pytest.raises(ValueError, match="other has embeddings of width 8, pool of 24; expected those of one backbone"):
        dedup([ImageSet("pool", one), ImageSet("other", other)], settings, tmp_path / "out", where=Where())
    with pytest.raises(ValueError, match="expected sets of different names, got pool, pool"):
        dedup([ImageSet("pool", one), ImageSet("pool", one)], settings, tmp_path / "out", where=Where())
    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match="threshold is a cosine similarity above 0 and at most 1"):
            DedupSettings(threshold=threshold)
    with pytest.raises(ValueError, match="role expects one of pool, trusted, held-out, got 'eval'"):
        ImageSet("pool", one, "eval")
    with pytest.raises(ValueError, match="holds no finished search for duplicates"):
        Duplicates(tmp_path / "nowhere")
    rows[5, 5] = np.nan
    bad = write_pool(tmp_path / "bad", rows)
    with pytest.raises(ValueError, match="NaN or infinite, the first in row 5 of"):
        dedup([ImageSet("bad", bad)], settings, tmp_path / "out", where=Where(), say=quiet)


def test_union_find_against_a_graph():
    rng = np.random.default_rng(0)
    for edges in (5, 40, 200):
        first, second = rng.integers(0, 100, (2, edges))
        groups = Groups(100)
        for start in range(0, edges, 7):
            groups.join(first[start : start + 7], second[start : start + 7])
        graph = networkx.Graph(zip(first.tolist(), second.tolist()))
        graph.add_nodes_from(range(100))
        for component in networkx.connected_components(graph):
            assert set(groups.roots()[list(component)].tolist()) == {min(component)}


def test_what_bf16_products_leave_out_is_below_the_threshold():
    """The margin covers the rounding of every pair."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(300, 40, generator=generator), dim=1)
    rounded = rows.bfloat16().double() @ rows.bfloat16().double().T
    error = (rounded - rows.double() @ rows.double().T).abs().max()
    assert error <= module._rounding(rows, rows) < 8e-3
