"""The frozen teacher: targets from whole global crops, computed once per batch however many students ask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ext import Collectives, sinkhorn_knopp

from ..data.batch import CropBatch
from ..losses import Targets
from ..train.networks import Networks


@dataclass(frozen=True)
class Bottlenecks:
    """The teacher's heads before their prototypes: what ranks exchange, as it is small beside logits."""

    dino: Tensor  # (G, B, bottleneck) unit vectors of the CLS of each global crop
    ibot: Tensor  # (M, bottleneck) unit vectors of the sampled patches


class FrozenTeacher:
    """Backbone and heads that do not change; a `TargetSource` of `train_step`.

    The first student that asks for the targets of a batch has them computed, the others get the same; `forget` ends
    the step. Where the teacher sees larger crops than the students, or has another grid, its patch features are
    resized to the grid of the masks (bicubic, as for Gram anchoring) before its iBOT head.

    Source: spec 3.6 (resizing), 5.1.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks.eval().requires_grad_(False)
        self._bottlenecks: dict[int, Bottlenecks] = {}
        self._targets: dict[tuple[int, float, int], Targets] = {}

    def forget(self) -> None:
        """Drop what was computed for the batches so far."""
        self._bottlenecks.clear()
        self._targets.clear()

    def remember(self, batch: CropBatch, found: Bottlenecks) -> None:
        """Take `found`, which other ranks may have computed, as this teacher's word on `batch`."""
        self._bottlenecks[_number(batch)] = found

    @torch.no_grad()
    def bottlenecks(self, batch: CropBatch, global_crops: Tensor) -> Bottlenecks:
        """The teacher's pass over global_crops (G, B, 3, Y, X), normalised, at the sampled positions of `batch`."""
        features = self._networks.backbone.forward_packed([global_crops.flatten(0, 1)])[0]
        side = math.isqrt(batch.masks.shape[-1])
        patches = resized_patches(features.patches, features.grid, (side, side))  # (G B, N, D)
        sampled = patches.flatten(0, 1)[batch.mask_indices]  # (M, D)
        dino = self._networks.dino_head.bottleneck(features.cls).unflatten(0, global_crops.shape[:2])
        return Bottlenecks(dino=dino, ibot=self._networks.ibot_head.bottleneck(sampled))

    @torch.no_grad()
    def targets(
        self, batch: CropBatch, global_crops: Tensor, *, temperature: float, iterations: int, collectives: Collectives
    ) -> Targets:
        """Logits and potentials of a batch; arguments as in `Networks.targets`.

        collectives: over the ranks that together hold the global batch of the asking student.
        """
        number = _number(batch)
        key = (number, temperature, iterations)
        if key not in self._targets:
            if number not in self._bottlenecks:
                self._bottlenecks[number] = self.bottlenecks(batch, global_crops)
            found = self._bottlenecks[number]
            dino_head, ibot_head = self._networks.dino_head.prototypes, self._networks.ibot_head.prototypes
            dino, ibot = dino_head(found.dino.flatten(0, 1)), ibot_head(found.ibot)  # (G B, K), (M, K)
            settings = {"temperature": temperature, "iterations": iterations, "collectives": collectives}
            self._targets[key] = Targets(
                dino_logits=dino.unflatten(0, found.dino.shape[:2]),
                dino_potentials=sinkhorn_knopp(dino, **settings),
                ibot_logits=ibot,
                ibot_potentials=sinkhorn_knopp(ibot, **settings),
                temperature=temperature,
            )
        return self._targets[key]


def resized_patches(patches: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Patch features (S, h w, D) on another grid, bicubic without antialiasing; as they are on their own."""
    if grid == wanted:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid).float()  # (S, D, h, w)
    resized = F.interpolate(maps, size=wanted, mode="bicubic", align_corners=False, antialias=False)
    return resized.flatten(2).transpose(1, 2)


def _number(batch: CropBatch) -> int:
    """What tells the micro-batches of a run apart: the sample index of their first image."""
    return int(batch.indices[0])
