"""What student and teacher hand to the loss terms, and what a term hands back.

B images per rank, G global and L local crops per image, N patch tokens, D width, K prototypes, M masked patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dinov3_ext import Collectives, Potentials

from ..data.batch import CropBatch


@dataclass(frozen=True)
class Outputs:
    """The student's side of one batch."""

    cls: Tensor  # (G, B, D) normed CLS of the global crops, before the head
    patches: Tensor  # (G, B, N, D) normed patch tokens of the global crops, masked positions included
    dino_logits: Tensor  # (G + L, B, K) of every crop's CLS, global crops first
    ibot_logits: Tensor  # (M, K) of the masked patches
    dense_logits: Tensor | None = None  # (G B N, K) of every patch, where there is a dense head


@dataclass(frozen=True)
class Targets:
    """The teacher's side: logits and the Sinkhorn-Knopp potentials that turn them into assignments. No gradient."""

    dino_logits: Tensor  # (G, B, K)
    dino_potentials: Potentials  # rows (G * B,), columns (K,)
    ibot_logits: Tensor  # (M, K)
    ibot_potentials: Potentials  # rows (M,), columns (K,)
    temperature: float  # of the teacher's logits
    dense_logits: Tensor | None = None  # (G B N, K)
    dense_potentials: Potentials | None = None  # rows (G B N,), columns (K,)
    gram_patches: Tensor | None = None  # (G', B, N, D') the Gram teacher's patches on the student's grid, G' <= G


@dataclass(frozen=True)
class LossPart:
    """One named number of a term: it enters the total as weight * value."""

    name: str
    value: Tensor  # scalar, fp32
    weight: float


class Term(Protocol):
    """A loss term. Values are means over the rank's images, so that averaging over ranks gives the global batch's."""

    def __call__(
        self, outputs: Outputs, targets: Targets, batch: CropBatch, collectives: Collectives
    ) -> list[LossPart]: ...
