r"""ViT-L/16 on ImageNet-1k: the one public end-to-end recipe of DINOv3, 82.0 to 82.2 k-NN and 83.3 to 83.5 linear.

Source: the published ImageNet-1k recipe (spec 4.4, 5 and 13.11). Hardware there: 32 H100, about 14 hours.
Not run by this project yet; the numbers above are the original's.

    torchrun --nnodes=4 --nproc-per-node=8 --no-python dinov3 pretrain recipe=vit_large_in1k \
        data=/data/imagenet/train out=runs/vit_large_in1k
"""

from dataclasses import replace

from ..config import Backbone, Config, Crops, Head, Losses, Optimizer, Rope, Run
from ..models.vit import BACKBONES


def vit_large_in1k() -> Config:
    head = Head(hidden=2048, bottleneck=256, prototypes=65536)
    backbone: Backbone = replace(
        BACKBONES["vit_large"],
        registers=0,
        norm_eps=1e-6,
        drop_path=0.3,
        rope=Rope(rescale=None),  # no position augmentation in this recipe
    )
    return Config(
        recipe="vit_large_in1k",
        backbone=backbone,
        dino_head=head,
        ibot_head=head,
        crops=Crops(global_size=224, local_size=96, horizontal_flip=0.5),
        losses=Losses(teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_temperature_warmup=37_500),
        optimizer=Optimizer(
            lr=1e-3,  # 5.66e-3 at batch 2048 under sqrt_wrt_1024
            lr_end=1.77e-7,  # 1e-6 after the batch rule
            warmup=12_500,
            weight_decay=0.04,
            weight_decay_end=0.4,
            layer_decay=0.9,
            clip=3.0,
            momentum=0.992,
            momentum_end=1.0,
            freeze_prototypes=1250,
        ),
        run=Run(steps=125_000, batch_size=2048, checkpoint_every=3750, checkpointing="selective", history_every=6250),
    )
