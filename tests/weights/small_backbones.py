"""Small backbones with weights large enough that a wrong table, norm or bias shows in the features."""

from __future__ import annotations

from dataclasses import replace

import torch

from dinov3_train.config import Backbone, ConvNeXtBackbone, Head
from dinov3_train.models.architectures import backbone_of
from dinov3_train.models.vit import BACKBONES

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
HEAD = Head(hidden=24, bottleneck=8, prototypes=20)
SMALL = {"embed_dim": 128, "depth": 2, "heads": 2, "patch_size": 8}
ARCHITECTURES = {
    "vit": replace(BACKBONES["vit_small"], name="vit_128x2", **SMALL),
    "swiglu": replace(BACKBONES["vit_small_plus"], name="vit_128x2", **SMALL),
    "convnext": ConvNeXtBackbone(name="convnext_8x16x24x32", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
}


@torch.no_grad()
def built(architecture: Backbone | ConvNeXtBackbone) -> torch.nn.Module:
    """The network with every weight drawn wide, the K bias 0."""
    torch.manual_seed(0)
    model = backbone_of(architecture)
    for key, parameter in model.named_parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter) + (1.0 if "norm" in key and "weight" in key else 0.0))
        if key.endswith("qkv.bias"):
            parameter.chunk(3)[1].zero_()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def largest_difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Of CLS, registers and patches of two images of 64 x 96."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    first, second = one.features(images), other.features(images)
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("cls", "registers", "patches")]
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)
