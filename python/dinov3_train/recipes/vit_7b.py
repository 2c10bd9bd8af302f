"""ViT-7B/16, stage 1 of the paper: for `dinov3 plan` until sharded training (FSDP2) lands.

Source: paper section 3 and appendix, spec 4.4 (7B pretrain). Hardware there: 256 H100, 61,440 GPU-hours in all.

    dinov3 plan recipe=vit_7b
"""

from dataclasses import replace

from ..config import Config, Crops, Head, Losses, Optimizer, Run
from ..models.vit import BACKBONES


def vit_7b() -> Config:
    return Config(
        recipe="vit_7b",
        backbone=replace(BACKBONES["vit_7b"], drop_path=0.4),
        dino_head=Head(hidden=8192, bottleneck=512, prototypes=262_144),
        ibot_head=Head(hidden=4096, bottleneck=384, prototypes=98_304),
        crops=Crops(global_size=256, local_size=112, horizontal_flip=0.0),
        losses=Losses(
            koleo_group=16, teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_temperature_warmup=100_000
        ),
        optimizer=Optimizer(
            lr=5e-5,  # 4.0e-4 at batch 4096
            warmup=100_000,
            betas=(0.9, 0.99),
            weight_decay=0.04,
            layer_decay=0.98,
            clip=30.0,
            momentum=0.999,  # paper; the published file says 0.994
            freeze_prototypes=5_000,
        ),
        run=Run(steps=1_000_000, batch_size=4096, checkpointing="selective", history_every=50_000),
    )
