"""iBOT: the student's masked patches predict the teacher's assignment of the same patches, seen unmasked."""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_ext import Collectives, assignment_cross_entropy

from ..data.batch import CropBatch
from .outputs import LossPart, Outputs, Targets


@dataclass(frozen=True, kw_only=True)
class IbotLoss:
    """Cross-entropy at masked patches, each weighted 1 / (masked patches of its crop), summed and divided by G B.

    The divisor counts unmasked crops too, so with half of the crops masked the value is half the mean over masked
    crops, as in every released model.

    Source: paper section 3.2, spec 3.4.
    """

    weight: float
    student_temperature: float

    def __call__(
        self, outputs: Outputs, targets: Targets, batch: CropBatch, collectives: Collectives
    ) -> list[LossPart]:
        crops = batch.masks.shape[0] * batch.masks.shape[1]  # G B
        loss = assignment_cross_entropy(
            outputs.ibot_logits[None],  # (1, M, K)
            targets.ibot_logits[None],
            targets.ibot_potentials,
            student_temperature=self.student_temperature,
            teacher_temperature=targets.temperature,
            weight=batch.mask_weights / crops,  # (M,)
        )
        return [LossPart("ibot", loss[0, 0], self.weight)]
