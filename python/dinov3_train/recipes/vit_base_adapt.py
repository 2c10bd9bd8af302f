"""High-resolution adaptation of `vit_base`: the paper's third stage at this size, up to three times the side.

Source: spec 5 (high-resolution stage), scaled by `stages.adaptation`. Not run by this project on a GPU yet.

    dinov3 adapt recipe=vit_base_adapt run=runs/vit_base_refine data=/path/to/images out=runs/vit_base_adapt
"""

from ..config import Config
from ..stages import adaptation
from .vit_base_refine import vit_base_refine


def vit_base_adapt() -> Config:
    return adaptation(vit_base_refine())
