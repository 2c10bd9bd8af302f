"""A small ViT for two CPU cores: 128 px photographs, 30 minutes, to see a backbone learn without a GPU.

dinov3 pretrain recipe=vit_tiny_cpu data=/path/to/images out=runs/vit_tiny_cpu
"""

from dataclasses import replace

from ..config import Config, Crops, Data, Head, Losses, Optimizer, Run
from ..models.vit import BACKBONES


def vit_tiny_cpu() -> Config:
    head = Head(hidden=512, bottleneck=128, prototypes=2048)
    return Config(
        recipe="vit_tiny_cpu",
        backbone=replace(BACKBONES["vit_tiny"], layer_scale=0.1),
        dino_head=head,
        ibot_head=head,
        crops=Crops(global_size=96, local_size=48, locals=4),
        data=Data(workers=1),
        losses=Losses(teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_temperature_warmup=500),
        optimizer=Optimizer(lr=2e-3, lr_rule="none", warmup=200, weight_decay=0.04, momentum=0.99),
        run=Run(steps=3000, batch_size=64, checkpoint_every=250),
    )
