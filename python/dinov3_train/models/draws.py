"""The random draws of one training step: rotary coordinates and drop path, as pure functions of counters.

Per-sequence rotary draws depend on (seed, global sample index, crop) only; per-block rotary draws and drop path on
(seed, step, block, crop group), drop path also on the position in the global batch. So the draws of two ranks are the
two halves of the draws of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from dinov3_train import counter
from dinov3_train.config import Backbone, ConvNeXtBackbone, Rope
from dinov3_train.models.rope import CoordinateDraw

BRANCHES = ("attention", "ffn")


@dataclass(frozen=True)
class TrainingDraws:
    """Draws of one step for the crop groups of one rank, in packed order (group, crop, image).

    rope: per crop group a draw; None: coordinates stay as they are.
    per_block: rows of the rope draws are blocks, not sequences.
    kept: bool (depth, 2, S), whether a sequence keeps (block, attention | ffn); None: no drop path.
    keep_share: 1 - drop path rate.
    """

    rope: tuple[CoordinateDraw, ...] | None
    per_block: bool
    kept: np.ndarray | None
    keep_share: float


def training_draws(
    backbone: Backbone | ConvNeXtBackbone,
    *,
    seed: int,
    step: int,
    indices: np.ndarray,
    first: int,
    crops_per_image: tuple[int, ...],
    batch_size: int,
) -> TrainingDraws:
    """Everything random inside the student's backbone in one step.

    Args:
        backbone: its rope augmentation (a ConvNeXt has none), depth and drop path rate are read.
        seed, step: of the run.
        indices: (B,) global sample indices of this rank's images.
        first: position of the rank's first image in the global batch.
        crops_per_image: crops of each crop group, (G, L) in pretraining; a group of none is left out.
        batch_size: images of the global batch.

    Errors: ValueError when the rank's images reach past the global batch, or for an unknown `rope.draw`.
    """
    indices = np.asarray(indices)
    if first < 0 or first + len(indices) > batch_size:
        raise ValueError(
            f"training_draws: expected positions within the global batch of {batch_size}, "
            f"got {first} to {first + len(indices)}"
        )
    crops = tuple(count for count in crops_per_image if count)
    rotary = not isinstance(backbone, ConvNeXtBackbone)
    return TrainingDraws(
        rope=_rope(backbone, seed, step, indices, crops) if rotary else None,
        per_block=rotary and backbone.rope.draw == "block",
        kept=_kept(backbone, seed, step, crops, range(first, first + len(indices)), batch_size),
        keep_share=1.0 - backbone.drop_path,
    )


def drop_path_phases(seed: int, step: int, group: int, branch: str, depth: int) -> np.ndarray:
    """Phases in [0, 1), float64 (depth,), stratified: (permutation + u) / depth.

    Each is uniform, and sum_i floor(P q + phase_i) = floor(depth P q + u): over the depth the number of kept sequences
    of P differs from depth P q by less than one (Hermite's identity).
    """
    offset = counter.uniform(seed, f"drop_path/{group}/{branch}", step, 1)
    return (counter.permutation(seed, f"drop_path/{group}/{branch}/{step}", depth) + offset) / depth


def systematic(positions: np.ndarray, share: float, phases: np.ndarray) -> np.ndarray:
    """Systematic sampling: keep p iff floor((p + 1) q + phase) > floor(p q + phase); bool (phases, positions)."""
    below = np.floor(positions * share + phases[:, None])
    return np.floor((positions + 1) * share + phases[:, None]) > below


def _kept(
    backbone: Backbone | ConvNeXtBackbone, seed: int, step: int, crops: tuple[int, ...], images: range, batch_size: int
) -> np.ndarray | None:
    if backbone.drop_path == 0.0:
        return None
    if not 0.0 < backbone.drop_path < 1.0:
        raise ValueError(f"backbone: drop_path expects a rate in [0, 1), got {backbone.drop_path}")
    share, groups = 1.0 - backbone.drop_path, []
    for group, count in enumerate(crops):
        positions = (np.arange(count)[:, None] * batch_size + np.arange(images.start, images.stop)).ravel()
        phases = [drop_path_phases(seed, step, group, branch, backbone.depth) for branch in BRANCHES]
        groups.append(np.stack([systematic(positions, share, phase) for phase in phases], axis=1))  # (depth, 2, S_g)
    return np.concatenate(groups, axis=2)


def _rope(
    backbone: Backbone, seed: int, step: int, indices: np.ndarray, crops: tuple[int, ...]
) -> tuple[CoordinateDraw, ...] | None:
    rope = backbone.rope
    if rope.draw not in ("sequence", "block"):
        raise ValueError(f"rope: draw expects sequence or block, got {rope.draw!r}")
    if rope.shift is None and rope.jitter is None and rope.rescale is None:
        return None
    draws = []
    for group, count in enumerate(crops):
        if rope.draw == "block":
            blocks = step * backbone.depth + np.arange(backbone.depth)
            uniform = counter.uniform(seed, f"rope/block/{group}", blocks, 5)
        else:
            streams = [f"rope/{group}/{crop}" for crop in range(count)]
            uniform = np.concatenate([counter.uniform(seed, stream, indices, 5) for stream in streams])
        draws.append(coordinate_draw(rope, uniform))
    return tuple(draws)


def coordinate_draw(rope: Rope, uniform: np.ndarray) -> CoordinateDraw:
    """Shift, then jitter, then rescale, from draws in [0, 1): float64 (n, 5) = shift y, x, jitter y, x, rescale.

    Errors: ValueError for a jitter or rescale below 1 or a negative shift.
    """
    for name, value, least in (("shift", rope.shift, 0), ("jitter", rope.jitter, 1), ("rescale", rope.rescale, 1)):
        if value is not None and value < least:
            raise ValueError(f"rope: {name} expects a number from {least}, got {value}")
    signed = 2.0 * uniform - 1.0
    shift = signed[:, 0:2] * (rope.shift or 0.0)
    logarithm = np.zeros_like(shift)
    if rope.jitter is not None:
        logarithm = logarithm + signed[:, 2:4] * math.log(rope.jitter)
    if rope.rescale is not None:
        logarithm = logarithm + signed[:, 4:5] * math.log(rope.rescale)
    return CoordinateDraw(
        shift=torch.from_numpy(shift.astype(np.float32)), scale=torch.from_numpy(np.exp(logarithm).astype(np.float32))
    )
