"""DINO: the CLS token of every student crop predicts the teacher's assignment of the global crops of its image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dinov3_ext import Collectives, assignment_cross_entropy

from ..data.batch import CropBatch
from .outputs import LossPart, Outputs, Targets


@dataclass(frozen=True, kw_only=True)
class DinoLoss:
    """l(s, t) = -sum_k q_t log softmax(z_s / temperature), averaged over crop pairs and images.

    Global crops predict the other global crops (G (G - 1) pairs), local crops predict all of them (L G pairs); each
    group's mean enters with its share of the pairs, 2/18 and 16/18 for two global and eight local crops. `local_weight`
    multiplies the local share without renormalising the global one.

    Source: paper section 3.2, spec 3.3.
    """

    weight: float
    student_temperature: float
    local_weight: float = 1.0

    def __call__(
        self, outputs: Outputs, targets: Targets, batch: CropBatch, collectives: Collectives
    ) -> list[LossPart]:
        losses = assignment_cross_entropy(
            outputs.dino_logits,
            targets.dino_logits,
            targets.dino_potentials,
            student_temperature=self.student_temperature,
            teacher_temperature=targets.temperature,
        )  # (G + L, G)
        teacher_crops = losses.shape[1]
        global_losses, local_losses = losses[:teacher_crops], losses[teacher_crops:]  # (G, G), (L, G)
        global_pairs, local_pairs = teacher_crops * (teacher_crops - 1), local_losses.numel()
        off_diagonal = ~torch.eye(teacher_crops, dtype=torch.bool, device=losses.device)
        scale = self.weight / (global_pairs + local_pairs)
        parts = []
        if global_pairs:
            parts.append(
                LossPart("dino_global", (global_losses * off_diagonal).sum() / global_pairs, scale * global_pairs)
            )
        if local_pairs:
            parts.append(LossPart("dino_local", local_losses.mean(), scale * local_pairs * self.local_weight))
        return parts
