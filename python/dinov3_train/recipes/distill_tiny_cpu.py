r"""A teacher of `vit_tiny_cpu` into a smaller ViT and a small ConvNeXt at once, on two CPU cores.

    dinov3 distill recipe=distill_tiny_cpu teacher=runs/vit_tiny_cpu data=/path/to/images out=runs/students

Heads, crops and temperatures are the teacher's recipe; what was measured: README and benchmarks/FACTS.md.
"""

from dataclasses import replace

from ..config import Config, Distillation, Masking
from ..models.vit import BACKBONES
from .vit_tiny_cpu import vit_tiny_cpu


def distill_tiny_cpu() -> Config:
    base = vit_tiny_cpu()
    return replace(
        base,
        recipe="distill_tiny_cpu",
        backbone=replace(BACKBONES["vit_micro"], patch_size=8),
        masking=Masking(hide=False),
        optimizer=replace(base.optimizer, lr_end=1e-5, warmup=100, momentum=0.98, momentum_end=0.997, cooldown=400),
        distillation=Distillation(students=("vit_micro", "convnext_micro"), head_steps=400),
        run=replace(base.run, steps=1500, keep=3),
    )
