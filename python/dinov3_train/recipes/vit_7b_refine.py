"""ViT-7B/16, stage 2 of the paper, Gram anchoring: for `dinov3 plan` until sharded training (FSDP2) lands.

Source: spec 5 (Gram stage; its absolute schedules counted from this stage's own first step). The Gram teacher of the
paper is the EMA after 100k or 200k of the 1M steps of stage 1.

    dinov3 plan recipe=vit_7b_refine
"""

from dataclasses import replace

from ..config import Config
from ..stages import refinement
from .vit_7b import vit_7b


def vit_7b_refine() -> Config:
    base = refinement(vit_7b())
    return replace(
        base,
        gram=replace(base.gram, ramp=1_000, refresh_every=10_000, refreshes=3),
        losses=replace(base.losses, local_weight_ramp=1_000),
        optimizer=replace(base.optimizer, lr=3e-5),  # 2.4e-4 at batch 4096
    )
