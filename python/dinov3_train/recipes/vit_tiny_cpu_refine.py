"""Gram refinement of `vit_tiny_cpu` on two CPU cores: ten minutes.

    dinov3 refine recipe=vit_tiny_cpu_refine run=runs/vit_tiny_cpu data=/path/to/images out=runs/vit_tiny_cpu_refine

The paper's losses and weights; steps, learning rate and the Gram teacher's 1.5 times larger crops are chosen for two
cores (benchmarks/FACTS.md has what was tried).
"""

from dataclasses import replace

from ..config import Config
from ..stages import refinement
from .vit_tiny_cpu import vit_tiny_cpu


def vit_tiny_cpu_refine() -> Config:
    base = refinement(vit_tiny_cpu())
    return replace(
        base,
        recipe="vit_tiny_cpu_refine",
        crops=replace(base.crops, gram_size=96),
        gram=replace(base.gram, ramp=20, refresh_every=0, refreshes=None),
        optimizer=replace(base.optimizer, lr=3e-4, lr_end=1e-5, warmup=20, momentum=0.99),
        losses=replace(base.losses, local_weight_ramp=20),
        run=replace(base.run, steps=400, keep=3),
    )
