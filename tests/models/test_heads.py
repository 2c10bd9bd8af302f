"""Projection heads."""

import pytest
import torch

from dinov3_train.config import Head
from dinov3_train.models.heads import ProjectionHead


def test_parameter_counts():
    """The heads of the 7B run and of ViT-L on ImageNet-1k: 239.1, 72.9 and 23.6 million."""
    with torch.device("meta"):
        for dim, head, millions in (
            (4096, Head(hidden=8192, bottleneck=512, prototypes=262_144), 239.1),
            (4096, Head(hidden=4096, bottleneck=384, prototypes=98_304), 72.9),
            (1024, Head(), 23.6),
        ):
            count = sum(p.numel() for p in ProjectionHead(dim, head).parameters())
            assert round(count / 1e6, 1) == millions


def test_logits_are_prototypes_times_unit_bottleneck():
    torch.manual_seed(0)
    head, x = ProjectionHead(24, Head(hidden=32, bottleneck=8, prototypes=12)), torch.randn(5, 24)
    unit = head.bottleneck(x)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(5))
    assert unit.dtype == torch.float32
    assert torch.equal(head(x), unit @ head.prototypes.weight.T)
    assert head.prototypes.bias is None
    assert not any("parametrizations" in key for key in head.state_dict())
    head(x).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_one_layer_and_none():
    assert len(ProjectionHead(4, Head(hidden=8, bottleneck=4, prototypes=4, layers=1)).mlp) == 1
    with pytest.raises(ValueError, match=r"layers expects at least 1, got 0"):
        ProjectionHead(4, Head(layers=0))


def test_autocast_gives_bf16_logits_from_a_unit_bottleneck():
    head = ProjectionHead(24, Head(hidden=32, bottleneck=8, prototypes=12))
    with torch.autocast("cpu", torch.bfloat16):
        unit = head.bottleneck(torch.randn(5, 24))
        logits = head(torch.randn(5, 24))
    assert unit.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert torch.allclose(unit.norm(dim=-1), torch.ones(5))
