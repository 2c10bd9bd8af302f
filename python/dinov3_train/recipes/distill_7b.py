r"""The paper's distillation of ViT-7B into ViT-S, S+, B, L and H+ together: for `dinov3 plan`.

Source: paper section 5 and appendix, spec 4.4 and 5.1: 1M steps at a constant rate and a cosine cool-down of 250k,
EMA .994 to 1, no masking, no Gram term, layer decay .99, teacher and students at 256 px. Batch 1920, as the published
job of four students on 296 GPUs had it (48, 48, 80 and 120 ranks). ConvNeXt: `distill_7b_convnext`.

    dinov3 plan recipe=distill_7b ranks=320
"""

from dataclasses import replace

from ..config import Config, Crops, Distillation, Head, Losses, Masking, Optimizer, Run
from ..models.vit import BACKBONES


def distill_7b() -> Config:
    return Config(
        recipe="distill_7b",
        backbone=replace(BACKBONES["vit_small"]),
        dino_head=Head(hidden=8192, bottleneck=512, prototypes=262_144),
        ibot_head=Head(hidden=4096, bottleneck=384, prototypes=98_304),
        crops=Crops(global_size=256, local_size=112, horizontal_flip=0.0),
        masking=Masking(hide=False),
        losses=Losses(koleo_group=None, teacher_temperature=0.07, teacher_temperature_start=0.07),
        optimizer=Optimizer(
            lr=4.81e-5,  # 2.63e-4 at batch 1920 (spec 4.4, whose rule counted the ranks of one student)
            warmup=12_500,
            cooldown=250_000,
            weight_decay=0.04,
            layer_decay=0.99,
            clip=3.0,
            momentum=0.994,
            momentum_end=1.0,
        ),
        distillation=Distillation(
            teacher="vit_7b",  # for `plan`; to train, teacher=RUN
            students=("vit_small", "vit_small_plus", "vit_base", "vit_large", "vit_huge_plus"),
        ),
        run=Run(steps=1_250_000, batch_size=1920, checkpointing="full"),
    )
