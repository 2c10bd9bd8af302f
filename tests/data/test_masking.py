"""Block masks: exact counts, constant totals, blocks that are blocks, and draws that follow the sample."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from dinov3_train.config import Masking
from dinov3_train.data.masking import block_masks, mask_counts, step_counts


def test_counts_of_the_specification():
    counts = mask_counts(32, 256, Masking())
    assert counts.tolist() == [int(256 * (0.1 + 0.025 * i)) for i in range(1, 17)]
    assert mask_counts(8, 40, Masking()).tolist() == [8, 12, 16, 20]  # 40 * 0.30 in floating point is below 12
    assert mask_counts(1, 256, Masking()).size == 0
    assert mask_counts(4, 100, Masking(crop_probability=1.0, ratio_min=0.3, ratio_max=0.3)).tolist() == [30] * 4


def test_the_total_of_a_step_is_constant_and_its_owners_change():
    steps = [step_counts(3, step, crops=32, patches=256, masking=Masking()) for step in range(50)]
    assert {int(counts.sum()) for counts in steps} == {int(mask_counts(32, 256, Masking()).sum())}
    assert 0.152 < steps[0].sum() / (32 * 256) < 0.164
    assert len({counts.tobytes() for counts in steps}) == 50
    masked = np.mean([counts > 0 for counts in steps], axis=0)
    assert 0.2 < masked.min()
    assert masked.max() < 0.8  # each crop in about half of the steps: 50 draws, 4 sigma


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (4, 4), (5, 9), (16, 16), (48, 48)])
def test_counts_are_exact_on_any_grid(grid):
    patches = grid[0] * grid[1]
    counts = np.unique(np.linspace(0, patches, 40).astype(int))
    masks = block_masks(counts, grid, seed=1, crops=np.arange(len(counts)))
    assert masks.shape == (len(counts), patches)
    assert masks.dtype == bool
    assert (masks.sum(1) == counts).all()


def test_each_mask_follows_its_crop_alone():
    counts, crops = np.array([40, 0, 77, 128]), np.array([5, 2**40, 9, 6])
    together = block_masks(counts, (16, 16), seed=2, crops=crops)
    for row in range(4):
        alone = block_masks(counts[row : row + 1], (16, 16), seed=2, crops=crops[row : row + 1])
        assert (alone[0] == together[row]).all()
    assert (block_masks(counts, (16, 16), seed=3, crops=crops) != together).any()
    assert (block_masks(counts, (16, 16), seed=2, crops=crops + 1) != together).any()


def test_masks_are_made_of_blocks():
    masks = block_masks(np.full(300, 77), (16, 16), seed=0, crops=np.arange(300))
    squares = torch.from_numpy(masks.reshape(300, 1, 16, 16)).float()
    neighbours = conv2d(squares, torch.tensor([[[[0, 1.0, 0], [1, 0, 1], [0, 1, 0]]]]), padding=1)
    together = (neighbours[squares > 0] / 4).mean().item()
    assert together > 0.7  # single patches at this share (.3) have .28, blocks .8
    in_block = conv2d(squares, torch.ones(1, 1, 2, 2)) == 4
    assert in_block.flatten(1).any(1).all()


def looped_mask(count: int, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """The same masks written down one block and one patch at a time."""
    mask, failures = np.zeros((height, width), dtype=bool), 0
    while mask.sum() < count and failures < 10:
        missing = count - mask.sum()
        area = random.uniform(4, min(missing, height * width / 2)) if missing > 4 else random.uniform(missing, 4)
        aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if rows < height and columns < width:
            top, left = random.integers(0, height - rows + 1), random.integers(0, width - columns + 1)
            block = mask[top : top + rows, left : left + columns]
            if 0 < (~block).sum() <= missing:
                block[:] = True
                failures = 0
    free = np.flatnonzero(~mask)
    mask.flat[random.permutation(free)[: count - mask.sum()]] = True
    return mask


def test_places_are_those_of_a_nested_loop():
    random = np.random.default_rng(0)
    for count in (20, 32):
        looped = np.mean([looped_mask(count, 8, 8, random) for _ in range(1500)], axis=0)
        made = block_masks(np.full(4000, count), (8, 8), seed=0, crops=np.arange(4000)).mean(0).reshape(8, 8)
        deviation = np.sqrt(looped * (1 - looped) * (1 / 1500 + 1 / 4000))
        assert (np.abs(made - looped) / deviation).max() < 4.5  # 64 shares, 1 in 2000 runs of other seeds


def test_a_count_beyond_the_grid_is_an_error():
    with pytest.raises(ValueError, match=r"counts must lie in \[0, 16\], got 3 to 17"):
        block_masks(np.array([3, 17]), (4, 4), seed=0, crops=np.arange(2))


def test_large_grids_take_less_than_a_millisecond_a_mask():
    counts = np.linspace(230, 1152, 64).astype(int)
    start = time.process_time()
    for first in range(0, 256, 64):
        block_masks(counts, (48, 48), seed=0, crops=np.arange(first, first + 64))
    assert (time.process_time() - start) / 256 < 3e-3  # measured .1 ms; the bound has room for a busy machine
