"""Balanced sampling: caps, exact targets, every level evened out, draws that depend on the seed alone."""

import numpy as np
import pytest
import torch

from dinov3_train.curation.cluster import Hierarchy
from dinov3_train.curation.files import write_array, write_json
from dinov3_train.curation.sample import balanced_sample, random_sample, shares


@pytest.fixture
def hierarchy(tmp_path):
    """build(labels of each level, bottom first)"""

    def build(*levels, distances=None) -> Hierarchy:
        write_json(tmp_path / "settings.json", {"clusters": [int(np.max(labels)) + 1 for labels in levels]})
        for number, labels in enumerate(levels, start=1):
            write_array(tmp_path / f"level_{number}_labels.npy", np.asarray(labels, dtype=np.int32))
        rows = len(levels[0])
        found = np.arange(rows, dtype=np.float32) if distances is None else np.asarray(distances, dtype=np.float32)
        write_array(tmp_path / "level_1_distances.npy", found)
        return Hierarchy(tmp_path)

    return build


@pytest.mark.parametrize("seed", range(4))
def test_shares_are_capped_sizes_with_the_exact_sum(seed):
    sizes = np.random.default_rng(seed).integers(0, 50, 20)
    for target in (0, 1, 19, 100, int(sizes.sum()) - 1, int(sizes.sum())):
        found = shares(sizes, target, seed, "s")
        assert found.sum() == target
        assert (found <= sizes).all()
        # no cluster gives two more than another that has some left
        left = sizes > found
        assert not left.any() or found.max() <= found[left].min() + 1


def test_shares_of_what_is_left_over_are_drawn():
    drawn = np.sum([shares(np.full(10, 5), 3, seed, "s") for seed in range(400)], axis=0)
    assert drawn.sum() == 1200
    # 120 each, standard deviation 9.2; five of them
    assert (np.abs(drawn - 120) < 46).all()


def test_each_level_is_evened_out(hierarchy):
    """Top cluster 0 holds 900 images in one cluster, top cluster 1 100 in ten: each gives half, the ten five each."""
    labels = np.concatenate([np.zeros(900, dtype=int), 1 + np.arange(100) % 10])
    found = hierarchy(labels, [0] + [1] * 10)
    rows = balanced_sample(found, 100)
    assert (np.diff(rows) > 0).all()
    assert np.bincount(labels[rows]).tolist() == [50, *[5] * 10]
    assert np.array_equal(rows, balanced_sample(found, 100))
    assert not np.array_equal(rows, balanced_sample(found, 100, seed=1))
    assert np.array_equal(balanced_sample(found, 1000), np.arange(1000))


def test_a_branch_that_has_too_few_gives_all_and_the_others_more(hierarchy):
    labels = np.repeat([0, 1, 2], [5, 100, 300])
    rows = balanced_sample(hierarchy(labels), 105)
    assert np.bincount(labels[rows]).tolist() == [5, 50, 50]


def test_closest_to_the_centroid(hierarchy):
    labels = np.array([0, 1, 0, 1, 0, 1])
    found = hierarchy(labels, distances=[0.3, 0.1, 0.2, 0.3, 0.1, 0.2])
    assert balanced_sample(found, 4, method="closest").tolist() == [1, 2, 4, 5]


def test_rows_already_taken_are_not_drawn_and_do_not_count(hierarchy):
    labels = np.repeat([0, 1], 50)
    taken = np.zeros(100, dtype=bool)
    taken[:45] = True
    rows = balanced_sample(hierarchy(labels), 20, taken=taken)
    assert not taken[rows].any()
    assert np.bincount(labels[rows]).tolist() == [5, 15]


def test_draws_within_a_cluster_are_uniform(hierarchy):
    found = hierarchy(np.zeros(20, dtype=int))
    counts = np.bincount(np.concatenate([balanced_sample(found, 5, seed=seed) for seed in range(800)]), minlength=20)
    # 200 each, standard deviation 12.2; five of them
    assert (np.abs(counts - 200) < 61).all()


def test_wrong_targets(hierarchy):
    found = hierarchy([0, 0, 1])
    for target in (0, 4):
        with pytest.raises(ValueError, match=f"target expects 1 to 3, the images there are, got {target}"):
            balanced_sample(found, target)
        with pytest.raises(ValueError, match=f"target expects 1 to 3, the images there are, got {target}"):
            random_sample(3, target)
    with pytest.raises(ValueError, match="method expects one of random, closest, got 'best'"):
        balanced_sample(found, 2, method="best")


def test_a_raw_sample():
    assert random_sample(10, 10).tolist() == list(range(10))
    assert len(set(random_sample(100, 40, seed=1).tolist())) == 40
    assert not torch.equal(*(torch.from_numpy(random_sample(100, 40, seed=seed)) for seed in (0, 1)))
