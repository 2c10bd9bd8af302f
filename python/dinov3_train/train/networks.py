"""A backbone with its two heads: the student, and in evaluation mode its EMA, the teacher."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dinov3_ext import Collectives, sinkhorn_knopp

from ..data.batch import CropBatch
from ..losses import Outputs, Targets
from ..models.convnext import ConvNeXt
from ..models.draws import TrainingDraws
from ..models.heads import ProjectionHead
from ..models.vit import VisionTransformer

# what is clipped separately and averaged into the teacher; the dense head where there is one
MODULES = ("backbone", "dino_head", "ibot_head", "dense_head")


class Networks(nn.Module):
    """Backbone, DINO head on CLS tokens, iBOT head on masked patches, perhaps a dense head on every patch."""

    def __init__(
        self,
        backbone: VisionTransformer | ConvNeXt,
        dino_head: ProjectionHead,
        ibot_head: ProjectionHead,
        *,
        checkpointing: str,
        hide_masked: bool = True,
        dense_head: ProjectionHead | None = None,
    ):
        """checkpointing: of activations; hide_masked: whether the student sees the mask token at masked patches."""
        super().__init__()
        self.hide_masked = hide_masked
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.dense_head = dense_head
        self.checkpointing = checkpointing

    def forward(
        self, batch: CropBatch, global_crops: Tensor, local_crops: Tensor | None, draws: TrainingDraws
    ) -> Outputs:
        """The student's pass: (masked) global crops and local crops through every layer together.

        Args:
            batch: masks and their indices.
            global_crops: (G, B, 3, Y, X) normalised.
            local_crops: (L, B, 3, y, x) normalised, or None without local crops.
            draws: rotary boxes and dropped branches of this step.
        """
        crops, masks = [global_crops.flatten(0, 1)], [batch.masks.flatten(0, 1) if self.hide_masked else None]
        if local_crops is not None:
            crops, masks = [*crops, local_crops.flatten(0, 1)], [*masks, None]
        groups = self.backbone.forward_packed(
            crops, masks=masks, draws=draws, local=[False, True][: len(crops)], checkpointing=self.checkpointing
        )
        images = global_crops.shape[1]
        patches = groups[0].patches  # (G B, N, D)
        masked = patches.flatten(0, 1)[batch.mask_indices]  # (M, D)
        cls = torch.cat([group.cls for group in groups])  # ((G + L) B, D)
        return Outputs(
            cls=groups[0].cls.unflatten(0, (-1, images)),
            patches=patches.unflatten(0, (-1, images)),
            dino_logits=self.dino_head(cls).unflatten(0, (-1, images)),
            ibot_logits=self.ibot_head(masked),
            dense_logits=None if self.dense_head is None else self.dense_head(patches.flatten(0, 1)),
        )

    @torch.no_grad()
    def targets(
        self, batch: CropBatch, global_crops: Tensor, *, temperature: float, iterations: int, collectives: Collectives
    ) -> Targets:
        """The teacher's pass: whole global crops, heads, and Sinkhorn-Knopp over the batch of all ranks.

        Args:
            batch: mask indices, the positions whose patches are targets.
            global_crops: (G, B, 3, Y, X) normalised.
            temperature: of the teacher's logits.
            iterations: of Sinkhorn-Knopp.
            collectives: exchange between ranks.
        """
        features = self.backbone.forward_packed([global_crops.flatten(0, 1)])[0]
        masked = features.patches.flatten(0, 1)[batch.mask_indices]  # (M, D)
        dino_logits, ibot_logits = self.dino_head(features.cls), self.ibot_head(masked)  # (G B, K), (M, K)
        dense_logits = None if self.dense_head is None else self.dense_head(features.patches.flatten(0, 1))
        settings = {"temperature": temperature, "iterations": iterations, "collectives": collectives}
        return Targets(
            dino_logits=dino_logits.unflatten(0, global_crops.shape[:2]),
            dino_potentials=sinkhorn_knopp(dino_logits, **settings),
            ibot_logits=ibot_logits,
            ibot_potentials=sinkhorn_knopp(ibot_logits, **settings),
            temperature=temperature,
            dense_logits=dense_logits,
            dense_potentials=None if dense_logits is None else sinkhorn_knopp(dense_logits, **settings),
        )


def teacher_of(student: Networks) -> Networks:
    """A frozen copy in evaluation mode, the EMA's starting point."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: Networks, student: Networks, *, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameters only, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
