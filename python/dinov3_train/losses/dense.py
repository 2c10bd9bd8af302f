"""Other ways to keep patch features apart and in place, which studies set against Gram anchoring."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dinov3_ext import Collectives, assignment_cross_entropy

from ..data.batch import CropBatch
from .koleo import _nearest_neighbour_loss
from .outputs import LossPart, Outputs, Targets


@dataclass(frozen=True, kw_only=True)
class PatchKoLeoLoss:
    """KoLeo inside each global crop: -log distance of a patch to its nearest other patch, mean over patches and images,
    summed over the global crops.

    Masked positions enter as the student sees them. Spec 3.5, on patches in place of CLS tokens.
    """

    weight: float

    def __call__(
        self, outputs: Outputs, targets: Targets, batch: CropBatch, collectives: Collectives
    ) -> list[LossPart]:
        per_crop = _nearest_neighbour_loss(outputs.patches).mean(dim=(1, 2))  # (G,)
        return [LossPart("koleo_patches", per_crop.sum(), self.weight)]


@dataclass(frozen=True, kw_only=True)
class FeatureDistillationLoss:
    """mean over crops and patches of 1 - cos(x_i, y_i), x the student's patches, y the Gram teacher's at their place.

    Features themselves are held, where Gram anchoring holds their similarities only.

    Errors: ValueError when the step brought no Gram teacher's patches, or they are of another width.
    """

    weight: float

    def __call__(
        self, outputs: Outputs, targets: Targets, batch: CropBatch, collectives: Collectives
    ) -> list[LossPart]:
        teacher = targets.gram_patches  # (G', B, N, D)
        if teacher is None or teacher.shape[-1] != outputs.patches.shape[-1]:
            found = "none" if teacher is None else f"width {teacher.shape[-1]}"
            raise ValueError(
                f"gram.features: expected a Gram teacher's patches of width {outputs.patches.shape[-1]}, got {found}"
            )
        student = outputs.patches[: len(teacher)]
        with torch.autocast(student.device.type, enabled=False):
            loss = 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()
        return [LossPart("gram_features", loss, self.weight)]


@dataclass(frozen=True, kw_only=True)
class DenseHeadLoss:
    """Cross-entropy of a dense head at every patch of the global crops, visible or masked: the student's against the
    teacher's Sinkhorn-Knopp assignment of the same place, mean over crops and patches.

    Errors: ValueError when the networks have no dense head.
    """

    weight: float
    student_temperature: float

    def __call__(
        self, outputs: Outputs, targets: Targets, batch: CropBatch, collectives: Collectives
    ) -> list[LossPart]:
        if outputs.dense_logits is None or targets.dense_logits is None or targets.dense_potentials is None:
            raise ValueError("losses.dense: expected networks with a dense head, got none")
        rows = len(outputs.dense_logits)  # G B N
        loss = assignment_cross_entropy(
            outputs.dense_logits[None],  # (1, G B N, K)
            targets.dense_logits[None],
            targets.dense_potentials,
            student_temperature=self.student_temperature,
            teacher_temperature=targets.temperature,
            weight=torch.full((rows,), 1.0 / rows, device=outputs.dense_logits.device),
        )
        return [LossPart("dense", loss[0, 0], self.weight)]
