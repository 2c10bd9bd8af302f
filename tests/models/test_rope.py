"""Axial rotary positions: coordinates, periods, tables, augmentation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov3_ext import rope_rotate
from dinov3_train.config import Rope
from dinov3_train.models.draws import coordinate_draw
from dinov3_train.models.rope import (
    CoordinateDraw,
    CropGroup,
    centres,
    coordinate_rows,
    packed_layout,
    periods,
    plain_table,
    table,
)

CPU = torch.device("cpu")


def test_coordinates_and_periods():
    assert centres(16)[0] == -0.9375
    assert centres(16)[-1] == 0.9375
    found = periods(64, 100.0)
    expected = 100.0 ** (np.arange(16) / 16)
    assert found[0] == 1.0
    assert found[-1].item() == pytest.approx(74.99, abs=0.005)
    assert periods(128, 100.0)[-1].item() == pytest.approx(86.6, abs=0.005)
    assert np.abs(found.numpy() / expected - 1).max() < 4 * 2.0**-24  # fp32 power: a few roundings
    assert found.dtype == torch.float32


def test_box_is_the_same_at_any_shape():
    coordinates = coordinate_rows((3, 5), None, CPU)
    assert torch.equal(coordinates, torch.cat((centres(3), centres(5))))


def test_prefix_is_not_rotated_and_patches_are():
    """A patch at (i, j) is turned by 2 pi c / period: first quarter from i, second from j, pairs (e, e + E/2)."""
    heads, width, prefix, grid = 2, 16, 5, (2, 3)
    layout = packed_layout((CropGroup(1, grid),), prefix, False, CPU)
    rope = plain_table((grid,), width, 100.0, CPU)
    qkv = torch.randn(prefix + 6, 3, heads, width, generator=torch.Generator().manual_seed(0))
    rotated = rope_rotate(qkv, rope, layout)
    assert torch.equal(rotated[:prefix], qkv[:prefix, :2])
    i, j, e = 1, 2, 6  # e in the second quarter of the half: angle from the column
    angle = 2 * math.pi * centres(3)[j].item() / periods(width, 100.0)[e - 4].item()
    token = prefix + i * 3 + j
    low, high = qkv[token, 0, 0, e].item(), qkv[token, 0, 0, e + 8].item()
    assert rotated[token, 0, 0, e].item() == pytest.approx(low * math.cos(angle) - high * math.sin(angle), abs=1e-5)
    assert rotated[token, 0, 0, e + 8].item() == pytest.approx(high * math.cos(angle) + low * math.sin(angle), abs=1e-5)


def test_own_rows_equal_shared_rows_without_shift_or_scale():
    groups = (CropGroup(2, (2, 3)), CropGroup(3, (1, 2)))
    qkv = torch.randn(2 * 11 + 3 * 7, 3, 1, 8, generator=torch.Generator().manual_seed(0))
    still = [CoordinateDraw(torch.zeros(g.count, 2), torch.ones(g.count, 2)) for g in groups]
    rows = torch.cat([coordinate_rows(g.grid, draw, CPU).flatten() for g, draw in zip(groups, still)])
    own = rope_rotate(qkv, table(rows, 8, 100.0), packed_layout(groups, 5, True, CPU))
    shared = rope_rotate(
        qkv, plain_table(tuple(g.grid for g in groups), 8, 100.0, CPU), packed_layout(groups, 5, False, CPU)
    )
    assert torch.equal(own, shared)


def test_augmentation_order_and_ranges():
    """(c + shift) * jitter * rescale, shift in +-s, factors log-uniform in [1/j, j] per axis and [1/r, r] for both."""
    low, high = np.zeros((1, 5)), np.full((1, 5), 1.0)
    rope = Rope(shift=0.2, jitter=1.5, rescale=2.0)
    draw = coordinate_draw(rope, low)
    assert torch.allclose(draw.shift, torch.tensor([[-0.2, -0.2]]))
    assert torch.allclose(draw.scale, torch.full((1, 2), 1 / 3.0))
    assert torch.allclose(coordinate_draw(rope, high).scale, torch.full((1, 2), 3.0))
    assert torch.allclose(coordinate_rows((1, 1), draw, CPU), torch.tensor([[-0.2 / 3, -0.2 / 3]]))
    only = coordinate_draw(replace(rope, shift=None, jitter=None), np.array([[0.1, 0.9, 0.2, 0.7, 0.75]]))
    assert not only.shift.any()
    assert torch.allclose(only.scale, torch.full((1, 2), 2.0**0.5))
    for wrong, least in ((Rope(jitter=0.9), 1), (Rope(shift=-0.1), 0), (Rope(rescale=0.0), 1)):
        with pytest.raises(ValueError, match=f"expects a number from {least}, got"):
            coordinate_draw(wrong, low)
