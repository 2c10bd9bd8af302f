r"""Distillation on one GPU or a few: a teacher of your own into ViT-S and ConvNeXt-T at once.

Source: the paper's distillation (section 5, spec 5.1 and 4.4): no student masking, constant rate, then a cosine
cool-down over the last fifth, EMA to 1. Heads are those of `vit_small`; a teacher without heads, such as an imported
backbone, gets them trained first. Not run by this project on a GPU yet, so no accuracy is promised here.

    dinov3 distill teacher=runs/vit_large students=vit_small,convnext_tiny data=/path/to/images out=runs/students
"""

from dataclasses import replace

from ..config import Config, Crops, Distillation, Head, Losses, Masking, Optimizer, Run
from ..models.vit import BACKBONES


def distill() -> Config:
    head = Head(hidden=2048, bottleneck=256, prototypes=16_384)
    return Config(
        recipe="distill",
        backbone=replace(BACKBONES["vit_small"]),
        dino_head=head,
        ibot_head=head,
        crops=Crops(global_size=224, local_size=96),  # multiples of a ConvNeXt's stride of 32
        masking=Masking(hide=False),
        losses=Losses(teacher_temperature=0.07, teacher_temperature_start=0.07),
        optimizer=Optimizer(
            lr=5e-4,
            warmup=2_000,
            cooldown=20_000,
            weight_decay=0.04,
            layer_decay=1.0,
            clip=3.0,
            momentum=0.994,
            momentum_end=1.0,
        ),
        distillation=Distillation(
            students=("vit_small", "convnext_tiny"),
            overrides=("convnext.optimizer.lr=2e-4", "convnext.optimizer.weight_decay_end=0.2"),  # spec 4.4
            head_steps=5_000,
        ),
        run=Run(steps=100_000, batch_size=128, checkpoint_every=2_000),
    )
