"""k-means against Lloyd's iteration written out in float64; starts, empty clusters, ranks."""

import numpy as np
import pytest
import torch

from dinov3_train.curation.kmeans import (
    InMemory,
    Selected,
    Where,
    assign,
    closest_rows,
    draw_rows,
    first_of_groups,
    kmeans,
    moved,
    pass_over,
    start,
)


def lloyd(points: torch.Tensor, centroids: torch.Tensor, iterations: int) -> torch.Tensor:
    """float64, no blocks, no empty clusters."""
    points, centroids = points.double(), centroids.double()
    for _ in range(iterations):
        labels = torch.cdist(points, centroids).argmin(dim=1)
        centroids = torch.stack([points[labels == k].mean(dim=0) for k in range(len(centroids))])
    return centroids


@pytest.mark.usefixtures("small_blocks")
def test_iterations_are_lloyds(blobs, write_pool, tmp_path):
    rows, _ = blobs([150, 60, 40], spread=0.3)
    points = Selected(write_pool(tmp_path, rows))
    first = start(points, 5, how="random", seed=3, stream="test")
    seen = []
    found = kmeans(points, first, 4, Where(), after=lambda number, _, distortion: seen.append((number, distortion)))
    whole = torch.from_numpy(rows).float()
    torch.testing.assert_close(found, lloyd(whole, first, 4).float(), rtol=1e-5, atol=1e-6)
    assert [number for number, _ in seen] == [1, 2, 3, 4]
    assert seen[0][1] == pytest.approx(float(torch.cdist(whole, first).amin(dim=1).square().sum()), rel=1e-4)
    distortions = [distortion for _, distortion in seen]
    assert distortions == sorted(distortions, reverse=True)


@pytest.mark.parametrize("how", ["random", "k-means++"])
def test_starts_are_different_points_and_depend_on_the_seed(how, blobs):
    rows, _ = blobs([300, 200])
    points = InMemory(torch.from_numpy(rows).float())
    one, again, other = (start(points, 40, how=how, seed=seed, stream="s") for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(torch.unique(one, dim=0)) == 40


def test_plus_plus_finds_rare_blobs_that_a_random_start_misses(blobs):
    """Nine blobs of 4 among 2,000 rows of one: 10 random rows rarely hold one of each."""
    rows, labels = blobs([2000, *[4] * 9], dim=32, spread=0.005)
    points = InMemory(torch.from_numpy(rows).float())

    def blobs_hit(how: str) -> float:
        found = []
        for seed in range(10):
            centres = start(points, 10, how=how, seed=seed, stream="s")
            place = torch.cdist(centres, points.tensor).argmin(dim=1)
            found.append(len(set(labels[place.numpy()])))
        return float(np.mean(found))

    assert blobs_hit("k-means++") > 9.0
    assert blobs_hit("random") < 3.0


def test_plus_plus_of_duplicates():
    """Three different rows among 60: the draws beyond them are duplicates, and there are no more than asked."""
    points = InMemory(torch.eye(3)[torch.arange(60) % 3])
    found = start(points, 5, how="k-means++", seed=0, stream="s")
    assert len(found) == 5
    assert len(torch.unique(found[:3], dim=0)) == 3


def test_wrong_starts():
    points = InMemory(torch.eye(3))
    with pytest.raises(ValueError, match="k expects 1 to 3, the number of points, got 4"):
        start(points, 4, how="random", seed=0, stream="s")
    with pytest.raises(ValueError, match="start expects one of k-means\\+\\+, random, got 'forgy'"):
        start(points, 2, how="forgy", seed=0, stream="s")


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 4), (10, 1000), (499, 1000), (501, 1000)])
def test_drawn_rows_are_different_and_sorted(count, size):
    rows = draw_rows(0, "s", count, size)
    assert len(rows) == count
    assert (np.diff(rows) > 0).all()
    assert rows.min() >= 0
    assert rows.max() < size
    assert np.array_equal(rows, draw_rows(0, "s", count, size))


def test_drawn_rows_are_uniform():
    counts = np.zeros(50)
    for seed in range(2000):
        counts[draw_rows(seed, "s", 5, 50)] += 1
    # 200 draws of each expected, standard deviation 13.4; five of them
    assert (np.abs(counts - 200) < 67).all()


def test_an_empty_cluster_takes_half_of_the_largest():
    points = InMemory(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 9 + [[0.0, 1.2]] * 2))
    far = torch.tensor([[1.0, 0.0], [0.0, 1.0], [50.0, 50.0]])
    found = pass_over(points, far, Where())
    assert found.counts.tolist() == [3, 11, 0]
    centroids = moved(found, far)
    mean = (9 * 1.0 + 2 * 1.2) / 11
    torch.testing.assert_close(centroids[0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(centroids[1:].mean(dim=0), torch.tensor([0.0, mean]))
    assert not torch.equal(centroids[1], centroids[2])
    later = pass_over(points, kmeans(points, far, 5, Where()), Where())
    assert later.counts.tolist() == [3, 9, 2] or later.counts.tolist() == [3, 2, 9]


def test_a_pool_of_one_image_many_times(tmp_path):
    points = InMemory(torch.ones(50, 4))
    first = start(points, 7, how="k-means++", seed=0, stream="s")
    found = kmeans(points, first, 3, Where())
    assert torch.isfinite(found).all()
    labels, distances = assign(points, found, Where())
    assert len(set(labels)) == 1
    assert distances.max() < 1e-5


def test_first_of_groups():
    groups = np.array([1, 0, 1, 1, 0, 2])
    values = np.array([0.3, 0.2, 0.1, 0.1, 0.4, 0.0])
    assert first_of_groups(groups, values, 1).tolist() == [1, 2, 5]
    assert first_of_groups(groups, values, 2).tolist() == [1, 4, 2, 3, 5]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_one(ranks, blobs, write_pool, tmp_path, on_ranks):
    rows, _ = blobs([300, 120, 80, 33], spread=0.3)
    points = Selected(write_pool(tmp_path, rows), np.arange(3, 520, 1))
    first = start(points, 9, how="k-means++", seed=0, stream="s")
    alone = kmeans(points, first, 3, Where())
    labels, distances = assign(points, alone, Where())
    near = closest_rows(points, alone, 4, Where())

    def work(collectives):
        where = Where(collectives=collectives)
        return kmeans(points, first, 3, where), assign(points, alone, where), closest_rows(points, alone, 4, where)

    found = on_ranks(ranks, work)
    for centroids, _, rows_near in found:
        torch.testing.assert_close(centroids, alone, rtol=0, atol=1e-6)  # another order of sums in fp32 blocks
        assert torch.equal(centroids, found[0][0])
        assert np.array_equal(rows_near, near)
    assert np.array_equal(np.concatenate([part[0] for _, part, _ in found]), labels)
    assert np.array_equal(np.concatenate([part[1] for _, part, _ in found]), distances)
    assert min(len(part[0]) for _, part, _ in found) > 0
