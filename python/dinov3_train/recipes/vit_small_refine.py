"""Gram refinement of `vit_small`: the paper's second stage at this size.

Source: spec 5 (Gram stage), scaled by `stages.refinement`. Not run by this project on a GPU yet.

    dinov3 refine recipe=vit_small_refine run=runs/vit_small teacher=auto data=/path/to/images out=runs/vit_small_refine
"""

from ..config import Config
from ..stages import refinement
from .vit_small import vit_small


def vit_small_refine() -> Config:
    return refinement(vit_small())
