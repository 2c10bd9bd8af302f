"""Axial rotary positions: coordinates of patch centres, the angle tables, and the layout of a packed token list.

A patch at row i of h has the coordinate 2 (i + 0.5) / h - 1, columns alike, so the box is [-1, 1]^2 at any resolution
and aspect ratio. Period k is base^(2k / (E/2)), k < E/4; the angle is 2 pi coordinate / period. Tables hold one row per
patch row and one per patch column of a sequence (or of a crop group, when all its sequences share them).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3_ext.ops.rope_attention import Layout


@dataclass(frozen=True)
class CropGroup:
    """Sequences of one size: how many, and their patch grid (h, w)."""

    count: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class CoordinateDraw:
    """Augmented coordinates: (c + shift) * scale, per axis (y, x).

    shift, scale: fp32 (n, 2), n = sequences of the group (drawn per sequence) or depth (drawn per block).
    """

    shift: Tensor
    scale: Tensor


def periods(head_width: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    """Periods of the E/4 frequencies, fp32 (E/4,): base^(2k / (E/2))."""
    exponents = torch.arange(head_width // 4, dtype=torch.float32, device=device) * (4.0 / head_width)
    return torch.pow(torch.tensor(base, dtype=torch.float32, device=device), exponents)


def centres(cells: int, device: torch.device | str = "cpu") -> Tensor:
    """Coordinates of the centres of `cells` equal cells of [-1, 1], fp32 (cells,)."""
    return 2.0 * ((torch.arange(cells, dtype=torch.float32, device=device) + 0.5) / cells) - 1.0


def table(coordinates: Tensor, head_width: int, base: float) -> Tensor:
    """Cosines and sines of the angles: coordinates fp32 (..., rows) -> fp32 (..., rows, 2, E/4)."""
    angles = 2.0 * math.pi * coordinates[..., None] / periods(head_width, base, coordinates.device)
    return torch.stack((angles.cos(), angles.sin()), dim=-2)


def coordinate_rows(grid: tuple[int, int], draw: CoordinateDraw | None, device: torch.device) -> Tensor:
    """Coordinates of the patch rows, then of the patch columns: fp32 (h + w,), or (n, h + w) with a draw."""
    y, x = centres(grid[0], device), centres(grid[1], device)
    if draw is None:
        return torch.cat((y, x))
    shift, scale = draw.shift.to(device), draw.scale.to(device)  # (n, 2)
    return torch.cat(((y + shift[:, :1]) * scale[:, :1], (x + shift[:, 1:]) * scale[:, 1:]), dim=1)


@functools.lru_cache(maxsize=32)
def packed_layout(groups: tuple[CropGroup, ...], prefix: int, own_rows: bool, device: torch.device) -> Layout:
    """The layout of all sequences of all crop groups one after another, kept per shape.

    Args:
        groups: crop groups in packed order.
        prefix: tokens before the patches (CLS and registers), which are not rotated.
        own_rows: each sequence has rotary rows of its own; otherwise a crop group shares them.
        device: where the op shall find it.
    """
    sizes = [(group.count, *group.grid) for group in groups]
    return Layout.uniform(sizes, prefix=prefix, tables="sequence" if own_rows else "group").to(device)


@functools.lru_cache(maxsize=32)
def plain_table(grids: tuple[tuple[int, int], ...], head_width: int, base: float, device: torch.device) -> Tensor:
    """Table of crop groups without augmentation, fp32 (sum of h + w, 2, E/4), kept per grid."""
    with torch.inference_mode(False):  # a kept inference tensor could never be saved for backward
        return table(torch.cat([coordinate_rows(grid, None, device) for grid in grids]), head_width, base)
