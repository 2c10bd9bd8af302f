"""Existing weights continued on other images on two CPU cores, in minutes: the continual recipe at its smallest.

    dinov3 pretrain recipe=continual_tiny_cpu init=runs/vit_tiny_cpu data=/path/to/images out=runs/continual

Frozen start, ramp, small rate of the backbone, as `continual_vit_small`; crops and temperatures of `vit_tiny_cpu`.
Architecture, heads and normalisation follow the weights. From `vit_tiny_cpu` of caltech101 to clothing, 479 steps moved
the CLS to a cosine of .937 and left k-NN where it was (benchmarks/FACTS.md): this shows the machinery, not a gain.
"""

from dataclasses import replace

from ..config import Config, Init, Optimizer, Run
from .vit_tiny_cpu import vit_tiny_cpu


def continual_tiny_cpu() -> Config:
    start = vit_tiny_cpu()
    return replace(
        start,
        recipe="continual_tiny_cpu",
        init=Init(architecture="weights"),
        optimizer=Optimizer(
            lr=1e-3,
            lr_rule="none",
            lr_end=1e-5,
            warmup=50,
            patch_embed_multiplier=1.0,
            backbone_rate=0.3,
            freeze_backbone=100,
            backbone_ramp=100,
            momentum=0.98,
            momentum_end=0.997,
        ),
        run=Run(steps=1_000, batch_size=32, checkpoint_every=200, history_every=200, drift_every=100),
    )
