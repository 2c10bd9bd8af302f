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
        self.head = head
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normals of `init_std` (MLP) and `prototype_std` (prototypes), biases 0."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=self.head.init_std)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes.weight, std=self.head.prototype_std)

    def bottleneck(self, x: Tensor) -> Tensor:
        """x (n, D) -> unit vectors fp32 (n, bottleneck)."""
        return F.normalize(self.mlp(x).float(), dim=-1, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, D) -> logits (n, K), bf16 under bf16 autocast."""
        return self.prototypes(self.bottleneck(x).to(self.prototypes.weight.dtype))
