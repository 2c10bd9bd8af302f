"""A small ViT for two CPU cores: photographs of 128 px, 30 minutes, to see a backbone learn without a GPU.

    dinov3 pretrain recipe=vit_tiny_cpu data=/path/to/images out=runs/vit_tiny_cpu

The losses are the paper's; sizes, crops, temperatures and the cosine learning rate are chosen for a few thousand steps
on a few thousand photographs (benchmarks/FACTS.md has what was tried). Expected result: README.
"""

from dataclasses import replace

from ..config import Config, Crops, Data, Head, Losses, Optimizer, Rope, Run
from ..models.vit import BACKBONES


def vit_tiny_cpu() -> Config:
    head = Head(hidden=512, bottleneck=128, prototypes=256, init_std=0.05, prototype_std=0.25)
    return Config(
        recipe="vit_tiny_cpu",
        backbone=replace(
            BACKBONES["vit_tiny"], depth=4, patch_size=8, layer_scale=1.0, init_std=0.07, rope=Rope(rescale=None)
        ),
        dino_head=head,
        ibot_head=head,
        crops=Crops(
            global_size=64,
            local_size=32,
            locals=2,
            global_scale=(0.5, 1.0),
            local_scale=(0.2, 0.5),
            blur="none",
        ),
        data=Data(workers=1),
        losses=Losses(teacher_temperature=0.03, teacher_temperature_start=0.03),
        optimizer=Optimizer(
            lr=1e-3,
            lr_rule="none",
            lr_end=1e-5,
            warmup=150,
            weight_decay=0.04,
            patch_embed_multiplier=1.0,
            momentum=0.98,
            momentum_end=0.997,
        ),
        run=Run(steps=5600, batch_size=32, checkpoint_every=200, keep=20, history_every=400),
    )
