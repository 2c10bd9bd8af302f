"""Hierarchies: blobs found, restarts exact, ranks equal, resampling helps the rare, wrong input in one line."""

import re

import numpy as np
import pytest
import torch

from dinov3_train.curation.cluster import ClusterSettings, Hierarchy, cluster, write_summary
from dinov3_train.curation.files import read_json
from dinov3_train.curation.kmeans import InMemory, Selected, Where

pytestmark = pytest.mark.usefixtures("small_blocks")
SETTINGS = ClusterSettings(clusters=(12, 3), iterations=4, resampling=2, nearest=5)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def pool(blobs, write_pool, tmp_path):
    return Selected(write_pool(tmp_path / "pool", blobs([200, 100, 60, 40], spread=0.2)[0]))


def test_blobs_are_found_whatever_their_size(blobs, write_pool, tmp_path):
    rows, labels = blobs([400, 100, 30, 10])
    found = cluster(
        Selected(write_pool(tmp_path / "pool", rows)),
        ClusterSettings(clusters=(8, 4), iterations=10, resampling=2, nearest=5),
        tmp_path / "out",
        where=Where(),
        say=quiet,
    )
    paths = found.paths(np.arange(len(rows)))
    assert paths.shape == (540, 2)
    for blob in range(4):
        assert len(set(paths[labels == blob, 0])) == 1  # one top cluster each
    assert sorted(found.sizes[1].tolist()) == [10, 30, 100, 400]
    assert found.sizes[0].sum() == 540
    assert len(found.distances) == 540
    write_summary(found)
    assert read_json(tmp_path / "out" / "summary.json")["levels"][1]["clusters"] == 4


def test_resampling_spreads_centroids_evenly(tmp_path):
    """9,000 points crowd a spot of radius 0.3, 1,000 fill the square around it: k-means spends its centroids where the
    points are, resampling where the square is."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([0.1 * rng.standard_normal((9000, 2)), rng.uniform(-1, 1, (1000, 2))])

    def share_in_the_crowd(resampling: int) -> float:
        settings = ClusterSettings(clusters=(100,), iterations=10, resampling=resampling, nearest=3, start="random")
        found = cluster(
            InMemory(torch.from_numpy(rows).float()), settings, tmp_path / str(resampling), where=Where(), say=quiet
        )
        return float((found.centroids(1).norm(dim=1) < 0.3).float().mean())

    plain, one, many = (share_in_the_crowd(resampling) for resampling in (0, 1, 4))
    assert plain > one > many
    assert many < plain - 0.1


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 5, 7, 9, 11, 13])
def test_killed_anywhere_and_continued_is_the_same_to_the_bit(pool, tmp_path, after):
    whole = cluster(pool, SETTINGS, tmp_path / "whole", where=Where(), say=quiet)
    lines = []

    def say(text: str) -> None:
        lines.append(text)
        if len(lines) == after:
            raise Killed

    try:
        cluster(pool, SETTINGS, tmp_path / "cut", where=Where(), say=say)
    except Killed:
        pass
    again: list[str] = []
    found = cluster(pool, SETTINGS, tmp_path / "cut", where=Where(), say=again.append)
    assert len(again) < len(lines) + 14 - after + 2
    for level in (1, 2):
        assert torch.equal(found.centroids(level), whole.centroids(level))
        assert np.array_equal(found.labels[level - 1], whole.labels[level - 1])
    assert np.array_equal(found.distances, whole.distances)


def test_a_restart_does_not_repeat_iterations(pool, tmp_path):
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        if "iteration 3" in text:
            raise Killed

    with pytest.raises(Killed):
        cluster(pool, SETTINGS, tmp_path / "out", where=Where(), say=say)
    again: list[str] = []
    cluster(pool, SETTINGS, tmp_path / "out", where=Where(), say=again.append)
    # the third was said before it was kept
    assert again[:2] == ["level 1 goes on after iteration 2", lines[-1]]
    finished: list[str] = []
    cluster(pool, SETTINGS, tmp_path / "out", where=Where(), say=finished.append)
    assert finished == []


def test_two_ranks_are_one(pool, tmp_path, on_ranks):
    alone = cluster(pool, SETTINGS, tmp_path / "one", where=Where(), say=quiet)
    found = on_ranks(2, lambda c: cluster(pool, SETTINGS, tmp_path / "two", where=Where(collectives=c), say=quiet))
    for each in found:
        assert np.array_equal(each.labels[0], alone.labels[0])
        assert np.array_equal(each.labels[1], alone.labels[1])
        torch.testing.assert_close(each.centroids(1), alone.centroids(1), rtol=0, atol=1e-6)
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left == {path.name for path in (tmp_path / "one").iterdir()}


def test_duplicates_of_everything(tmp_path):
    lines: list[str] = []
    found = cluster(
        InMemory(torch.eye(3)[torch.arange(300) % 3]), SETTINGS, tmp_path / "out", where=Where(), say=lines.append
    )
    assert sorted(found.sizes[0].tolist()) == [100, 100, 100]
    assert found.distances.max() < 1e-5
    assert any("9 of 12 clusters are empty and left out" in line for line in lines)


def test_more_clusters_than_points_or_levels_that_grow(pool, tmp_path):
    with pytest.raises(ValueError, match="500 clusters of 400 points; expected no more clusters than points"):
        cluster(pool, ClusterSettings(clusters=(500, 3)), tmp_path / "out", where=Where(), say=quiet)
    assert not (tmp_path / "out").exists()
    for wrong in ({"clusters": (10, 10)}, {"clusters": (0,)}, {"clusters": ()}):
        with pytest.raises(ValueError, match="cluster: clusters expects"):
            ClusterSettings(**wrong)
    with pytest.raises(ValueError, match="iterations expects at least 1, got 0"):
        ClusterSettings(clusters=(3,), iterations=0)


def test_another_call_may_not_use_the_folder(pool, tmp_path):
    cluster(pool, SETTINGS, tmp_path / "out", where=Where(), say=quiet)
    with pytest.raises(ValueError, match=re.escape("iterations: 4 there, 5 now")):
        cluster(pool, ClusterSettings(clusters=(12, 3), iterations=5), tmp_path / "out", where=Where(), say=quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and was not made by this command"):
        cluster(pool, SETTINGS, tmp_path / "other", where=Where(), say=quiet)


def test_nan_embeddings_are_named(blobs, write_pool, tmp_path):
    rows, _ = blobs([150])
    rows[117, 3] = np.nan
    points = Selected(write_pool(tmp_path / "pool", rows))
    with pytest.raises(ValueError, match="NaN or infinite, the first in row 117 of .*pool \\(/pool/117.jpg\\)"):
        cluster(points, ClusterSettings(clusters=(3,)), tmp_path / "out", where=Where(), say=quiet)


def test_an_unfinished_or_damaged_hierarchy(pool, tmp_path):
    with pytest.raises(ValueError, match="holds no clusters"):
        Hierarchy(tmp_path)
    cluster(pool, SETTINGS, tmp_path / "out", where=Where(), say=quiet)
    labels = tmp_path / "out" / "level_1_labels.npy"
    labels.write_bytes(labels.read_bytes()[:300])
    with pytest.raises(ValueError, match="level_1_labels.npy is missing, cut or damaged"):
        Hierarchy(tmp_path / "out")
    (tmp_path / "out" / "level_2_labels.npy").unlink()
    with pytest.raises(ValueError, match="is not finished; the same command goes on"):
        Hierarchy(tmp_path / "out")
