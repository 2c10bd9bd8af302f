"""A small ViT for two CPU cores: photographs of 128 px, 30 minutes, to see a backbone learn without a GPU.

dinov3 pretrain recipe=vit_tiny_cpu data=/path/to/images out=runs/vit_tiny_cpu
"""

from dataclasses import replace

from ..config import Config, Crops, Data, Head, Losses, Optimizer, Rope, Run
from ..models.vit import BACKBONES


def vit_tiny_cpu() -> Config:
    head = Head(hidden=512, bottleneck=128, prototypes=256, init_std=0.05, prototype_std=0.25)
    return Config(
        recipe="vit_tiny_cpu",
        backbone=replace(BACKBONES["vit_tiny"], depth=4, layer_scale=1.0, init_std=0.07, rope=Rope(rescale=None)),
        dino_head=head,
        ibot_head=head,
        crops=Crops(
            global_size=80,
            local_size=48,
            locals=2,
            global_scale=(0.4, 1.0),
            local_scale=(0.15, 0.5),
            blur="none",
            color_jitter=(0.2, 0.2, 0.1, 0.05),
            grayscale=0.1,
            solarize=0.1,
        ),
        data=Data(workers=1),
        losses=Losses(teacher_temperature=0.05, teacher_temperature_start=0.04, teacher_temperature_warmup=1000),
        optimizer=Optimizer(
            lr=1e-3,
            lr_rule="none",
            lr_end=1e-5,
            warmup=80,
            weight_decay=0.04,
            patch_embed_multiplier=1.0,
            momentum=0.97,
            momentum_end=0.995,
        ),
        run=Run(steps=6000, batch_size=32, checkpoint_every=500),
    )
