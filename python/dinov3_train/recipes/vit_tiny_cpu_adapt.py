"""High-resolution adaptation of `vit_tiny_cpu` on two CPU cores: from 64 px to 96 and 128 px, a few minutes.

    dinov3 adapt recipe=vit_tiny_cpu_adapt run=runs/vit_tiny_cpu_refine data=/path/to/images out=runs/vit_tiny_cpu_adapt

The paper's procedure at 1.5 and 2 times the pretraining's side instead of 2 and 3 times.
"""

from dataclasses import replace

from ..config import Config
from ..stages import adaptation
from .vit_tiny_cpu_refine import vit_tiny_cpu_refine


def vit_tiny_cpu_adapt() -> Config:
    base = adaptation(vit_tiny_cpu_refine())
    return replace(
        base,
        recipe="vit_tiny_cpu_adapt",
        crops=replace(
            base.crops,
            global_size=128,
            gram_size=160,
            mix=((96, 32, 128, 0.6), (128, 32, 160, 0.2), (128, 48, 160, 0.2)),
        ),
        optimizer=replace(base.optimizer, lr=1e-4, warmup=50),
        run=replace(base.run, steps=150, checkpointing="none"),
    )
