"""Features of a real backbone on real photographs, spoiled in one way each: the monitor's signs name that way."""

from dataclasses import replace

import pytest
import torch

from dinov3_train.evaluation.panel import Panel, PanelFeatures, measures, panel_features
from dinov3_train.evaluation.signatures import signs
from dinov3_train.evaluation.view import View
from dinov3_train.models.heads import ProjectionHead
from dinov3_train.models.vit import VisionTransformer
from dinov3_train.photographs import PHOTOGRAPHS
from dinov3_train.recipes import recipe


@pytest.fixture(scope="module")
def healthy() -> tuple[PanelFeatures, dict[str, ProjectionHead]]:
    """The small recipe's backbone and heads on photographs of the scikit packages."""
    torch.manual_seed(0)
    config = recipe("vit_tiny_cpu")
    backbone = VisionTransformer(config.backbone)
    heads = {name: ProjectionHead(192, getattr(config, name)) for name in ("dino_head", "ibot_head")}
    view, finer = View(size=64), View(size=128)
    images = [photograph.open() for photograph in PHOTOGRAPHS]
    panel = Panel(
        names=tuple(photograph.name for photograph in PHOTOGRAPHS),
        pixels=torch.stack([view.pixels(image) for image in images]),
        finer=torch.stack([finer.pixels(image) for image in images]),
        view=view,
    )
    return panel_features(backbone, panel), heads


def noise(like: torch.Tensor, share: float) -> torch.Tensor:
    return share * like.std() * torch.randn(like.shape, generator=torch.Generator().manual_seed(3))


def overwritten(features: PanelFeatures) -> PanelFeatures:
    cls = features.cls[:, None, None]
    return replace(features, patches=0.35 * features.patches + 2.0 * cls, finer=0.35 * features.finer + 2.0 * cls)


def outlying(features: PanelFeatures) -> PanelFeatures:
    raw = features.raw.clone()
    raw[::3, 1, 2] *= 12
    return replace(features, raw=raw)


def one_dimension(features: PanelFeatures) -> PanelFeatures:
    raw = features.raw.clone()
    raw[..., 7] = 60 * raw.std()
    return replace(features, raw=raw)


def collapsed(features: PanelFeatures) -> PanelFeatures:
    return replace(features, cls=features.cls[:1] + noise(features.cls, 0.02))


def noisy(features: PanelFeatures) -> PanelFeatures:
    patches, finer = (part + noise(part, 2.0) for part in (features.patches, features.finer))
    return replace(features, patches=patches, finer=finer)


def resolution_bound(features: PanelFeatures) -> PanelFeatures:
    return replace(features, finer=features.finer.roll(5, dims=0))


SPOILED = {
    "patch similarities turn to noise": noisy,
    "CLS and patches grow alike": overwritten,
    "patches of outlying norm": outlying,
    "dimension of outlying size": one_dimension,
    "images all alike": collapsed,
    "features change with resolution": resolution_bound,
}


def looked(features: PanelFeatures, heads, step: int) -> dict[str, float]:
    return {"step": step, **measures(features, heads=heads)}


def test_the_healthy_features_show_nothing(healthy):
    features, heads = healthy
    assert signs([looked(features, heads, 100), looked(features, heads, 200)]) == []


@pytest.mark.parametrize("name", SPOILED)
def test_each_degradation_is_named(healthy, name):
    features, heads = healthy
    found = signs([looked(features, heads, 100), looked(SPOILED[name](features), heads, 200)])
    assert name in [sign.name for sign in found]
    # what follows from the cause may be named too, what does not may not
    allowed = {
        "images all alike": {"DINO prototypes collapse"},
        "CLS and patches grow alike": {"patches all alike", "few directions", "iBOT prototypes collapse"},
        "patch similarities turn to noise": {"features change with resolution"},
    }
    assert {sign.name for sign in found} <= {name} | allowed.get(name, set())


@pytest.mark.parametrize(("kind", "cause"), [("one", "same answer"), ("uniform", "targets say nothing")])
def test_collapsed_prototypes_are_named(healthy, kind, cause):
    features, heads = healthy
    spoiled = {name: ProjectionHead(192, head.head) for name, head in heads.items()}
    with torch.no_grad():
        for head in spoiled.values():
            if kind == "one":
                head.mlp[-1].bias.copy_(torch.ones_like(head.mlp[-1].bias) * 1e4)  # every row's bottleneck is the same
            else:
                head.prototypes.weight.zero_()
    found = signs([looked(features, heads, 100), looked(features, spoiled, 200)])
    assert {sign.name for sign in found} == {"DINO prototypes collapse", "iBOT prototypes collapse"}
    assert all(cause in sign.text for sign in found)
