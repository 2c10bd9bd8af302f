"""ViT-S/16 on one GPU of 24 GB: DINOv3 pretraining on your own folder of images.

Source: the paper's losses and constant schedules (section 3) with heads and batch scaled to one GPU. Expected memory:
`dinov3 plan recipe=vit_small`. Not run by this project on a GPU yet, so no accuracy is promised here.

    dinov3 pretrain recipe=vit_small data=/path/to/images out=runs/vit_small
"""

from dataclasses import replace

from ..config import Config, Crops, Head, Losses, Optimizer, Run
from ..models.vit import BACKBONES


def vit_small() -> Config:
    head = Head(hidden=2048, bottleneck=256, prototypes=16_384)  # few samples per step: fewer prototypes (spec trap 33)
    return Config(
        recipe="vit_small",
        backbone=replace(BACKBONES["vit_small"], drop_path=0.1),
        dino_head=head,
        ibot_head=head,
        crops=Crops(global_size=224, local_size=96),
        losses=Losses(teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_temperature_warmup=15_000),
        optimizer=Optimizer(
            lr=5e-4,  # 7.1e-4 at batch 128
            warmup=5_000,
            weight_decay=0.04,
            layer_decay=1.0,
            clip=3.0,
            momentum=0.996,
            freeze_prototypes=1_000,
        ),
        run=Run(steps=200_000, batch_size=128, checkpoint_every=2_000, history_every=10_000),
    )
