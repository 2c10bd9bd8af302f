"""ViT-7B/16, stage 3 of the paper, high-resolution adaptation: for `dinov3 plan` until sharded training (FSDP2) lands.

Source: spec 5 (high-resolution stage): sides up to 768 px, Gram crops up to 1152, batch 2048.

    dinov3 plan recipe=vit_7b_adapt
"""

from dataclasses import replace

from ..config import Config
from ..stages import adaptation
from .vit_7b_refine import vit_7b_refine


def vit_7b_adapt() -> Config:
    base = adaptation(vit_7b_refine())
    return replace(
        base,
        optimizer=replace(base.optimizer, lr=1.25e-5, warmup=10_000),  # 7.07e-5 at batch 2048
        run=replace(base.run, steps=30_000, checkpoint_every=250),  # published file; the paper says 10k
    )
