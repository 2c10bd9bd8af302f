"""Gram anchoring: the student keeps the patch similarities of a Gram teacher, whatever its features become."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dinov3_ext import Collectives, gram_loss

from ..data.batch import CropBatch
from .outputs import LossPart, Outputs, Targets


@dataclass(frozen=True, kw_only=True)
class GramLoss:
    """mean over crops and patch pairs of (cos(x_i, x_j) - cos(y_i, y_j))^2, x the student's patches, y the teacher's.

    All patches of the global crops enter, those masked in the student's input too; the gradient reaches the student
    only. `level` "image" compares the patches of a crop with each other, "batch" all patches of all ranks' crops.
    Teachers of another width are allowed: only their similarities count.

    Errors: ValueError when the step brought no Gram teacher's patches.
    Source: paper section 4.2, spec 3.6 (a mean, not the Frobenius norm of the paper's formula).
    """

    weight: float
    clip: str = "none"
    level: str = "image"

    def __call__(
        self, outputs: Outputs, targets: Targets, batch: CropBatch, collectives: Collectives
    ) -> list[LossPart]:
        teacher = targets.gram_patches  # (G', B, N, D')
        if teacher is None:
            raise ValueError(
                "gram: the term needs a Gram teacher's patches, and the training state has no Gram teacher"
            )
        student = outputs.patches[: len(teacher)]  # (G', B, N, D)
        width = max(student.shape[-1], teacher.shape[-1])
        student, teacher = _widened(student, width), _widened(teacher, width)
        if self.level == "batch":
            student, teacher = (
                collectives.all_gather(patches.transpose(0, 1)).flatten(0, 2)[None] for patches in (student, teacher)
            )  # (1, W B G' N, D)
        else:
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)  # (G' B, N, D)
        return [LossPart("gram", gram_loss(student, teacher, clip=self.clip), self.weight)]


def _widened(patches: Tensor, width: int) -> Tensor:
    """(..., D) -> (..., width) with zeros, which no cosine notices."""
    return patches if patches.shape[-1] == width else F.pad(patches, (0, width - patches.shape[-1]))
