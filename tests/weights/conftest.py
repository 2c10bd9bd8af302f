"""Small resolved backbones, and a file as released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_backbones import ARCHITECTURES, HEAD, MEAN, STD, built

from dinov3_train.models import key_maps
from dinov3_train.models.heads import ProjectionHead
from dinov3_train.weights import Resolved


@pytest.fixture(scope="session")
def small() -> Callable[..., Resolved]:
    """A resolved small backbone by kind, with changes to its architecture."""

    def make(kind: str = "vit", *, heads: bool = False, **changes) -> Resolved:
        architecture = replace(ARCHITECTURES[kind], **changes)
        return Resolved(
            backbone=built(architecture),
            architecture=architecture,
            heads={name: ProjectionHead(architecture.embed_dim, HEAD) for name in ("dino_head", "ibot_head")}
            if heads
            else None,
            mean=MEAN,
            std=STD,
            size=64,
            origin="a test",
            licence="a test's own",
        )

    return make


@pytest.fixture
def official(small, tmp_path) -> Path:
    """A file as released: official keys, zero biases under zero masks, bf16 periods."""
    found = small()
    state = key_maps.to_official(found.backbone.state_dict(), heads=2)
    state = {key: torch.zeros_like(tensor) if "qkv.bias" in key else tensor for key, tensor in state.items()}
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    path = tmp_path / "dinov3_vits16_pretrain_lvd1689m-00000000.pth"
    torch.save(state, path)
    return path
