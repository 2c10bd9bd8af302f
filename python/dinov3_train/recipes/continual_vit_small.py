"""Public DINOv3 ViT-S/16 weights continued on your own images, on one GPU of 24 GB.

Source: the losses of the paper (section 3) without its Gram term; frozen start, ramp and small rate are this project's
choice for weights that come without heads. Any ViT or ConvNeXt that `init=` takes will do: architecture and
normalisation follow the weights. Not run by this project on a GPU yet, so no gain is promised here: the drift lines of
the run say how far the features have moved, and `dinov3 evaluate` on your own labelled images whether that was good.

    dinov3 pretrain recipe=continual_vit_small data=/path/to/images out=runs/continual
    dinov3 pretrain recipe=continual_vit_small init=hf:facebook/dinov3-vits16-pretrain-lvd1689m data=... out=...
"""

from dataclasses import replace

from ..config import Config, Crops, Head, Init, Losses, Optimizer, Run
from ..models.vit import BACKBONES


def continual_vit_small() -> Config:
    head = Head(hidden=2048, bottleneck=256, prototypes=16_384)  # few samples per step: fewer prototypes (spec trap 33)
    return Config(
        recipe="continual_vit_small",
        backbone=replace(BACKBONES["vit_small"], drop_path=0.1),
        dino_head=head,
        ibot_head=head,
        crops=Crops(global_size=256, local_size=112, horizontal_flip=0.5),  # sides the released weights were made at
        losses=Losses(teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_temperature_warmup=4_000),
        init=Init(weights="timm:vit_small_patch16_dinov3.lvd1689m", architecture="weights"),
        optimizer=Optimizer(
            lr=5e-4,  # of the heads; 7.1e-4 at batch 128
            lr_end=1e-6,
            warmup=500,
            backbone_rate=0.1,
            freeze_backbone=2_000,
            backbone_ramp=2_000,
            layer_decay=0.9,
            momentum=0.996,
            momentum_end=1.0,
        ),
        run=Run(
            steps=20_000, batch_size=128, checkpoint_every=1_000, history_every=2_000, drift_every=500, drift_images=64
        ),
    )
