"""Counter-based draws: uniform, independent, and the same numbers for ever."""

import hashlib

import numpy as np
import pytest

from dinov3_train.counter import image_seed, permutation, uniform

DRAWS = 200_000


def test_values_are_pinned():
    """Another hash would give every run other crops, masks and drops: these numbers must not change."""
    expected = [[0.9522034250020316, 0.6751180120903421], [0.12246238692009592, 0.8520387603270222]]
    assert uniform(0, "rope/0/0", np.array([0, 1]), 2).tolist() == expected
    assert uniform(7, "mask", 2**40, 1).tolist() == [0.33738873268401903]
    assert image_seed(3, "crops", 12345) == 6931318412217417254
    assert permutation(1, "epoch/0", 10).tolist() == [4, 6, 3, 7, 0, 8, 5, 9, 2, 1]


def test_the_hash_is_splitmix64():
    """Draws written out in whole numbers; the finaliser gives the published first output of SplitMix64 with seed 0."""

    def mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF
    key = int.from_bytes(hashlib.blake2b(b"5/stream", digest_size=8).digest(), "little")
    expected = [(mix((mix(key ^ mix(99)) + draw * golden) % 2**64) >> 11) * 2.0**-53 for draw in (1, 2, 3)]
    assert uniform(5, "stream", 99, 3).tolist() == expected


def test_shapes_and_range():
    assert uniform(0, "a", 5, 3).shape == (3,)
    values = uniform(0, "a", np.arange(DRAWS), 5)
    assert values.shape == (DRAWS, 5)
    assert values.dtype == np.float64
    assert 0.0 <= values.min()
    assert values.max() < 1.0
    assert uniform(0, "a", np.arange(0), 5).shape == (0, 5)


def test_a_draw_depends_on_its_index_alone():
    together = uniform(9, "a", np.array([4, 8, 2**50]), 4)
    for row, index in zip(together, (4, 8, 2**50)):
        assert np.array_equal(row, uniform(9, "a", index, 4))
        assert np.array_equal(row[:2], uniform(9, "a", index, 2))  # asking for more draws changes none


def test_uniform():
    """Chi-squared of 256 cells, over indices and over draws, within five standard deviations."""
    for values in (uniform(1, "a", np.arange(DRAWS), 1).ravel(), uniform(1, "a", 77, DRAWS)):
        counts = np.bincount((values * 256).astype(int), minlength=256)
        chi_squared = ((counts - DRAWS / 256) ** 2 / (DRAWS / 256)).sum()
        assert abs(chi_squared - 255) < 5 * np.sqrt(2 * 255)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(DRAWS)


@pytest.mark.parametrize(
    "other",
    [
        lambda n: uniform(2, "a", np.arange(n), 1),  # another seed
        lambda n: uniform(1, "b", np.arange(n), 1),  # another stream
        lambda n: uniform(1, "a", np.arange(n) + 1, 1),  # the neighbouring index
        lambda n: uniform(1, "a", np.arange(n), 2)[:, 1:],  # the next draw
        lambda n: uniform(1, "a", np.arange(n) * 2, 1),
    ],
)
def test_streams_are_independent(other):
    """Correlation and joint counts of 16 x 16 cells within five standard deviations."""
    first, second = uniform(1, "a", np.arange(DRAWS), 1).ravel(), other(DRAWS).ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(DRAWS)
    joint = np.bincount((first * 16).astype(int) * 16 + (second * 16).astype(int), minlength=256)
    assert abs(((joint - DRAWS / 256) ** 2 / (DRAWS / 256)).sum() - 255) < 5 * np.sqrt(2 * 255)


def test_permutation():
    order = permutation(3, "epoch/1", 1000)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, permutation(3, "epoch/1", 1000))
    for other in (permutation(3, "epoch/2", 1000), permutation(4, "epoch/1", 1000)):
        assert (order == other).sum() < 10  # one fixed point is expected


def test_image_seeds_differ():
    seeds = {image_seed(seed, stream, index) for seed in range(5) for stream in ("a", "b") for index in range(1000)}
    assert len(seeds) == 10_000
    assert 0 <= min(seeds)
    assert max(seeds) < 2**63
