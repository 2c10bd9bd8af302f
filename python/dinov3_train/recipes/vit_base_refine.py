"""Gram refinement of `vit_base`: the paper's second stage at this size.

Source: spec 5 (Gram stage), scaled by `stages.refinement`. Not run by this project on a GPU yet.

    dinov3 refine recipe=vit_base_refine run=runs/vit_base teacher=auto data=/path/to/images out=runs/vit_base_refine
"""

from ..config import Config
from ..stages import refinement
from .vit_base import vit_base


def vit_base_refine() -> Config:
    return refinement(vit_base())
