"""Retrieval: the nearest by brute force, caps, seeds credited, clusters, ranks."""

import numpy as np
import pytest
import torch

from dinov3_train.curation.cluster import ClusterSettings, cluster
from dinov3_train.curation.kmeans import InMemory, Selected, Where
from dinov3_train.curation.retrieve import Retrieved, RetrieveSettings, retrieve

pytestmark = pytest.mark.usefixtures("small_blocks")


def quiet(_: str) -> None:
    pass


@pytest.fixture
def pool(blobs, write_pool, tmp_path):
    rows, labels = blobs([120, 60, 30, 20], spread=0.06)
    return Selected(write_pool(tmp_path / "pool", rows)), rows.astype(np.float64), labels


def similarities(rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    rows, seeds = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (rows, seeds))
    return seeds @ rows.T


@pytest.mark.parametrize("neighbours", [1, 3, 17])
def test_the_union_of_nearest_neighbours(pool, neighbours):
    points, rows, _ = pool
    seeds = np.random.default_rng(1).standard_normal((9, 16))
    found = retrieve(
        points, InMemory(torch.from_numpy(seeds).float()), RetrieveSettings(neighbours=neighbours), where=Where()
    )
    exact = similarities(rows, seeds)
    expected = {int(row) for line in exact for row in np.argsort(-line, kind="stable")[:neighbours]}
    assert set(found.rows.tolist()) == expected
    assert (np.diff(found.rows) > 0).all()
    for row, seed, similar in zip(found.rows, found.seeds, found.similarity):
        assert similar == pytest.approx(exact[seed, row], abs=1e-5)
        asking = [s for s in range(9) if row in np.argsort(-exact[s], kind="stable")[:neighbours]]
        assert exact[seed, row] == pytest.approx(max(exact[s, row] for s in asking), abs=1e-6)


def test_a_handful_of_seeds_brings_their_kind(pool):
    points, _, labels = pool
    seeds = np.flatnonzero(labels == 2)[:5]
    found = retrieve(points, InMemory(points.take(seeds)), RetrieveSettings(neighbours=30, per_set=30), where=Where())
    assert len(found.rows) == 30
    assert (labels[found.rows] == 2).mean() > 0.95


def test_a_cap_takes_every_seeds_nearest_first(pool):
    points, _, labels = pool
    seeds = np.concatenate([np.flatnonzero(labels == 0)[:5], np.flatnonzero(labels == 3)[:1]])
    found = retrieve(points, InMemory(points.take(seeds)), RetrieveSettings(neighbours=10, per_set=6), where=Where())
    assert found.rows.tolist() == sorted(seeds.tolist())  # each is nearest to itself


def test_dissimilar_images_are_not_retrieved(pool):
    points, rows, _ = pool
    seeds = np.random.default_rng(1).standard_normal((9, 16))
    settings = RetrieveSettings(neighbours=50, least_similarity=0.5)
    found = retrieve(points, InMemory(torch.from_numpy(seeds).float()), settings, where=Where())
    assert set(found.rows) == set(np.flatnonzero(similarities(rows, seeds).max(axis=0) >= 0.5))
    nothing = retrieve(
        points, InMemory(-points.take(np.arange(1))), RetrieveSettings(least_similarity=0.9), where=Where()
    )
    assert len(nothing.rows) == 0


def test_more_neighbours_than_images(pool):
    points, _, _ = pool
    found = retrieve(points, InMemory(points.take(np.arange(2))), RetrieveSettings(neighbours=1000), where=Where())
    assert found.rows.tolist() == list(range(230))


def test_clusters_that_hold_seeds(pool, tmp_path):
    points, _, _ = pool
    settings = ClusterSettings(clusters=(5,), iterations=10, resampling=0)
    hierarchy = cluster(points, settings, tmp_path / "c", where=Where(), say=quiet)
    labels = hierarchy.labels[0]
    one, other = np.argsort(np.bincount(labels))[-2:]
    seeds = InMemory(
        points.take(np.concatenate([np.flatnonzero(labels == one)[:4], np.flatnonzero(labels == other)[:1]]))
    )

    def found(**asked):
        asked = RetrieveSettings(method="clusters", **asked)
        return retrieve(points, seeds, asked, where=Where(), hierarchy=hierarchy, say=quiet)

    every = found()
    assert set(every.rows) == set(np.flatnonzero((labels == one) | (labels == other)))
    assert set(every.seeds[labels[every.rows] == other]) == {4}
    fewer = found(min_seeds=2, per_cluster=20)
    assert len(fewer.rows) == 20
    assert set(labels[fewer.rows]) == {one}
    assert len(found(per_set=8).rows) == 8
    assert len(found(min_seeds=5).rows) == 0
    asked = RetrieveSettings(method="clusters")
    with pytest.raises(ValueError, match="method=clusters expects the clusters of this pool"):
        retrieve(points, seeds, asked, where=Where())
    with pytest.raises(ValueError, match="method=clusters expects the clusters of this pool"):
        retrieve(Selected(points.embeddings, np.arange(9)), seeds, asked, where=Where(), hierarchy=hierarchy)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_one(pool, on_ranks, ranks):
    points, _, _ = pool
    seeds = InMemory(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)))
    settings = RetrieveSettings(neighbours=6, per_set=40)
    alone = retrieve(points, seeds, settings, where=Where())
    for found in on_ranks(ranks, lambda c: retrieve(points, seeds, settings, where=Where(collectives=c))):
        assert np.array_equal(found.rows, alone.rows)
        assert np.array_equal(found.seeds, alone.seeds)
        np.testing.assert_allclose(found.similarity, alone.similarity, atol=1e-6)


def test_files_and_wrong_input(pool, tmp_path):
    points, _, _ = pool
    found = retrieve(points, InMemory(points.take(np.arange(2))), RetrieveSettings(), where=Where())
    found.write(tmp_path / "x.npz")
    assert np.array_equal(Retrieved.read(tmp_path / "x.npz").rows, found.rows)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match="x.npz is missing, cut or damaged"):
        Retrieved.read(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="the pool has width 16, the seeds 3; expected one backbone"):
        retrieve(points, InMemory(torch.eye(3)), RetrieveSettings(), where=Where())
    for wrong, text in (
        ({"method": "far"}, "method expects one of nearest, clusters, got 'far'"),
        ({"neighbours": 0}, "neighbours expects at least 1, got 0"),
        ({"per_set": 0}, "per_set expects at least 1, got 0"),
        ({"least_similarity": 2}, "least_similarity is a cosine"),
    ):
        with pytest.raises(ValueError, match=text):
            RetrieveSettings(**wrong)
