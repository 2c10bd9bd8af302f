r"""The paper's distillation of ViT-7B into ConvNeXt-T, S, B and L together: for `dinov3 plan`.

Source: spec 4.4 and 5 (`distillation_convnext`): 625k steps of batch 4096, rate 2e-4 (T, S) or 1e-4 (B, L), weight
decay .04 (B: .02) to .2, EMA .994 to 1, the teacher at 512 px and the students at 256. Local crops are 128 px here and
112 there, which is no multiple of the stride of 32: that convolution cuts the rest off.

    dinov3 plan recipe=distill_7b_convnext ranks=128
"""

from dataclasses import replace

from ..config import Distillation
from ..models.convnext import CONVNEXTS
from .distill_7b import distill_7b


def distill_7b_convnext():
    base = distill_7b()
    return replace(
        base,
        recipe="distill_7b_convnext",
        backbone=replace(CONVNEXTS["convnext_tiny"], patch_size=16),
        crops=replace(base.crops, local_size=128),
        losses=replace(base.losses, teacher_temperature_start=0.04, teacher_temperature_warmup=150_000),
        optimizer=replace(
            base.optimizer,
            lr=2e-4,
            lr_end=1e-6,
            warmup=100_000,
            cooldown=0,
            weight_decay_end=0.2,
            layer_decay=1.0,
        ),
        distillation=Distillation(
            teacher="vit_7b",
            students=("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
            overrides=(
                "convnext_base.optimizer.lr=1e-4",
                "convnext_base.optimizer.weight_decay=0.02",
                "convnext_large.optimizer.lr=1e-4",
            ),
            teacher_size=512,
        ),
        run=replace(base.run, steps=625_000, batch_size=4096),
    )
