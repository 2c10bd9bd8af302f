"""ViT-L/16 on one GPU of 40 GB: `vit_small`'s recipe with a larger backbone and selective checkpointing.

Not run by this project on a GPU yet, so no accuracy is promised here. Memory: `dinov3 plan recipe=vit_large`.

    dinov3 pretrain recipe=vit_large data=/path/to/images out=runs/vit_large
"""

from dataclasses import replace

from ..config import Config
from ..models.vit import BACKBONES
from .vit_small import vit_small


def vit_large() -> Config:
    base = vit_small()
    return replace(
        base,
        recipe="vit_large",
        backbone=replace(BACKBONES["vit_large"], drop_path=0.3),
        optimizer=replace(base.optimizer, layer_decay=0.9),
        run=replace(base.run, batch_size=64, checkpointing="selective"),
    )
