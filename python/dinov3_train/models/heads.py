"""Projection heads of DINO and iBOT: an MLP to a unit-length bottleneck, then prototypes."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_train.config import Head


class ProjectionHead(nn.Module):
    """prototypes(normalise(mlp(x))): linears with GELU between, L2 normalisation, a linear without bias."""

    def __init__(self, dim: int, head: Head) -> None:
        """dim: width D of the features; head: hidden, bottleneck, prototypes, layers (>= 1)."""
        super().__init__()
        if head.layers < 1:
            raise ValueError(f"head: layers expects at least 1, got {head.layers}")
        widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = nn.Linear(head.bottleneck, head.prototypes, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights truncated normal 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def bottleneck(self, x: Tensor) -> Tensor:
        """x (n, D) -> unit vectors fp32 (n, bottleneck)."""
        return F.normalize(self.mlp(x).float(), dim=-1, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, D) -> logits (n, K), bf16 under bf16 autocast."""
        return self.prototypes(self.bottleneck(x).to(self.prototypes.weight.dtype))
