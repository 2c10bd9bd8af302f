"""ViT-B/16 on one GPU of 48 GB: `vit_small`'s recipe with a larger backbone, a smaller batch and layer-wise decay.

Not run by this project on a GPU yet, so no accuracy is promised here. Memory: `dinov3 plan recipe=vit_base`.

    dinov3 pretrain recipe=vit_base data=/path/to/images out=runs/vit_base
"""

from dataclasses import replace

from ..config import Config
from ..models.vit import BACKBONES
from .vit_small import vit_small


def vit_base() -> Config:
    base = vit_small()
    return replace(
        base,
        recipe="vit_base",
        backbone=replace(BACKBONES["vit_base"], drop_path=0.1),
        optimizer=replace(base.optimizer, layer_decay=0.95),
        run=replace(base.run, batch_size=128),
    )
