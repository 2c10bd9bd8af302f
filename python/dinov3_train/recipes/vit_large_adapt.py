"""High-resolution adaptation of `vit_large`: the paper's third stage at this size, up to three times the side.

Source: spec 5 (high-resolution stage), scaled by `stages.adaptation`. Not run by this project on a GPU yet.

    dinov3 adapt recipe=vit_large_adapt run=runs/vit_large_refine data=/path/to/images out=runs/vit_large_adapt
"""

from ..config import Config
from ..stages import adaptation
from .vit_large_refine import vit_large_refine


def vit_large_adapt() -> Config:
    return adaptation(vit_large_refine())
