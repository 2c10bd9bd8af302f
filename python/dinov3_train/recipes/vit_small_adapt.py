"""High-resolution adaptation of `vit_small`: the paper's third stage at this size, up to three times the side.

Source: spec 5 (high-resolution stage), scaled by `stages.adaptation`. Not run by this project on a GPU yet.

    dinov3 adapt recipe=vit_small_adapt run=runs/vit_small_refine data=/path/to/images out=runs/vit_small_adapt
"""

from ..config import Config
from ..stages import adaptation
from .vit_small_refine import vit_small_refine


def vit_small_adapt() -> Config:
    return adaptation(vit_small_refine())
