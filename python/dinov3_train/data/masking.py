"""Block masks for iBOT: BEiT's blocks (Bao et al., 2021, section 2.3), made for all crops of a batch at once.

Each count and each place is a function of (seed, step) or (seed, crop), so masks do not depend on workers or ranks.
"""

from __future__ import annotations

import math

import numpy as np

from .. import counter
from ..config import Masking

TRIES = 10  # placements of a block that may fail in a row before single patches fill the rest
LOWEST_AREA = 4  # patches of the smallest block
LOWEST_ASPECT = 0.3  # height over width lies in [0.3, 1 / 0.3], log-uniform


def mask_counts(crops: int, patches: int, masking: Masking) -> np.ndarray:
    """Masked patches of each crop that is masked at all, ascending.

    n = int(p * crops) crops are masked, the i-th of them (from 1) in int(patches * r_i), r_i evenly spaced:
    linspace(ratio_min, ratio_max, n + 1)[i]. Result: int64 (n,).
    """
    masked = int(masking.crop_probability * crops)
    ratios = np.linspace(masking.ratio_min, masking.ratio_max, masked + 1)[1:]
    # the margin undoes the rounding of linspace: 40 patches at 0.30 are 12, not int(11.999999999999998)
    return np.floor(patches * ratios + 1e-9).astype(np.int64)


def step_counts(seed: int, step: int, *, crops: int, patches: int, masking: Masking) -> np.ndarray:
    """Masked patches of every crop of the global batch, dealt out by a permutation of (seed, step): int64 (crops,).

    Their sum is the same in every step, so the work of a step is constant.
    """
    counts = np.zeros(crops, dtype=np.int64)
    masked = mask_counts(crops, patches, masking)
    counts[: len(masked)] = masked
    return counts[counter.permutation(seed, f"mask-counts/{step}", crops)]


def block_masks(counts: np.ndarray, grid: tuple[int, int], *, seed: int, crops: np.ndarray) -> np.ndarray:
    """Masks of exactly `counts` patches each, made of rectangles, then of single patches for what is left.

    A rectangle has area U(4, min(missing, N / 2)), aspect log-uniform in [0.3, 1 / 0.3], and is smaller than the grid
    on both sides; it is placed if it adds at least one patch and not more than are missing. After ten placements in a
    row that failed, random single patches make the count exact.

    counts: int64 (n,), 0 to N; grid: (h, w); crops: int64 (n,), the number that each crop's draws follow from.
    Result: bool (n, N), N = h * w.
    """
    height, width = grid
    counts = np.asarray(counts, dtype=np.int64)
    if counts.size and not 0 <= counts.min() <= counts.max() <= height * width:
        raise ValueError(f"block_masks: counts must lie in [0, {height * width}], got {counts.min()} to {counts.max()}")
    masks = np.zeros((len(counts), height, width), dtype=bool)
    missing, failures = counts.copy(), np.zeros(len(counts), dtype=np.int64)
    active, attempt = np.flatnonzero(missing > 0), 0
    while active.size:
        draws = counter.uniform(seed, f"mask-block/{attempt}", crops[active], 4)
        block, area = _blocks(draws, missing[active], grid)  # (n, h, w), (n,)
        added = np.count_nonzero(block & ~masks[active], axis=(1, 2))
        placed = (area > 0) & (added > 0) & (added <= missing[active])
        masks[active[placed]] |= block[placed]
        missing[active] -= np.where(placed, added, 0)
        failures[active] = np.where(placed, 0, failures[active] + 1)
        active = active[(missing[active] > 0) & (failures[active] < TRIES)]
        attempt += 1
    masks = masks.reshape(len(counts), height * width)
    _fill(masks, missing, seed=seed, crops=crops)
    return masks


def _blocks(draws: np.ndarray, missing: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles from draws (n, 4) = area, aspect, top, left: bool (n, h, w) and areas (n,), 0 where too big."""
    height, width = grid
    largest = np.minimum(missing, height * width / 2)
    area = LOWEST_AREA + draws[:, 0] * (largest - LOWEST_AREA)
    aspect = np.exp((2 * draws[:, 1] - 1) * -math.log(LOWEST_ASPECT))
    rows, columns = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # (n,)
    fits = (rows < height) & (columns < width)
    top = np.floor(draws[:, 2] * (height - rows + 1))[:, None]  # (n, 1)
    left = np.floor(draws[:, 3] * (width - columns + 1))[:, None]
    y, x = np.arange(height), np.arange(width)
    in_rows = (y >= top) & (y < top + rows[:, None])  # (n, h)
    in_columns = (x >= left) & (x < left + columns[:, None])  # (n, w)
    return in_rows[:, :, None] & in_columns[:, None, :], rows * columns * fits


def _fill(masks: np.ndarray, missing: np.ndarray, *, seed: int, crops: np.ndarray) -> None:
    """Set `missing` (n,) random unmasked patches of each row of masks (n, N), in place."""
    rows = np.flatnonzero(missing)
    if not rows.size:
        return
    scores = counter.uniform(seed, "mask-fill", crops[rows], masks.shape[1])  # (n, N)
    scores[masks[rows]] = 2.0  # behind every free patch
    order = np.argsort(scores, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(masks.shape[1])[None, :], axis=1)
    masks[rows] |= rank < missing[rows, None]
