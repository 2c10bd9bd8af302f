"""Gram refinement of `vit_large`: the paper's second stage at this size.

Source: spec 5 (Gram stage), scaled by `stages.refinement`. Not run by this project on a GPU yet.

    dinov3 refine recipe=vit_large_refine run=runs/vit_large teacher=auto data=/path/to/images out=runs/vit_large_refine
"""

from ..config import Config
from ..stages import refinement
from .vit_large import vit_large


def vit_large_refine() -> Config:
    return refinement(vit_large())
