"""Each measure against its formula written out, at its extremes, and on features that were spoiled on purpose."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_train.config import Backbone
from dinov3_train.evaluation import health
from dinov3_train.evaluation.panel import measures, open_panel, panel_features
from dinov3_train.evaluation.view import View
from dinov3_train.models.vit import VisionTransformer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def smooth(images: int = 4, side: int = 8, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Healthy maps: a few blobs of feature per image, bilinearly enlarged, with a little noise."""
    coarse = noise(images, width, 3, 3, seed=seed)
    maps = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return maps.permute(0, 2, 3, 1) + 0.1 * noise(images, side, side, width, seed=seed + 1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_locality_is_one_minus_gearys_ratio():
    patches = smooth(images=1, side=4)[0]
    flat = patches.reshape(16, -1)
    everywhere = np.mean([cosine(flat[i], flat[j]) for i in range(16) for j in range(16) if i != j])
    pairs = [((y, x), (y, x + 1)) for y in range(4) for x in range(3)]
    pairs += [((y, x), (y + 1, x)) for y in range(3) for x in range(4)]
    near = np.mean([cosine(patches[a], patches[b]) for a, b in pairs])
    assert health.locality(patches[None]) == pytest.approx((near - everywhere) / (1 - everywhere), abs=1e-5)
    assert health.patch_similarity(patches[None]) == pytest.approx(everywhere, abs=1e-5)


def test_similarities_are_means_of_cosines():
    cls, patches = noise(3, 5), noise(3, 2, 2, 5, seed=1)
    expected = np.mean([cosine(cls[n], patches[n, y, x]) for n in range(3) for y in range(2) for x in range(2)])
    assert health.cls_patch_similarity(cls, patches) == pytest.approx(expected, abs=1e-6)
    expected = np.mean([cosine(cls[i], cls[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert health.image_similarity(cls) == pytest.approx(expected, abs=1e-6)


def test_pca_coherence_is_morans_i():
    """One feature that varies: Moran's I of that map itself, mean over images weighted by their variance."""
    maps = noise(3, 5, 4).double()
    patches = torch.zeros(3, 5, 4, 6)
    patches[..., 2] = maps.float()
    total, weight = 0.0, 0.0
    for z in maps - maps.mean(dim=(1, 2), keepdim=True):
        ordered = [
            (y, x, a, b) for y in range(5) for x in range(4) for a, b in ((y + 1, x), (y, x + 1)) if a < 5 and b < 4
        ]
        products = sum(z[y, x] * z[a, b] for y, x, a, b in ordered)
        squares = z.square().sum()
        total += float(20 / len(ordered) * products / squares * squares)
        weight += float(squares)
    assert health.pca_coherence(patches) == pytest.approx(total / weight, abs=1e-5)


def test_effective_rank_counts_directions():
    rows = torch.zeros(6, 4)
    rows[[0, 1, 2, 3], [0, 0, 1, 1]] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert health.effective_rank(rows) == pytest.approx(2.0)
    assert health.effective_rank(torch.ones(5, 3) * 7) == 1.0
    assert health.effective_rank(noise(5000, 8)) == pytest.approx(8, abs=0.05)
    assert health.effective_rank(noise(5, 64)) <= 4.0 + 1e-9  # at most n - 1
    values = torch.linalg.svdvals(noise(30, 6).double() - noise(30, 6).double().mean(0)) ** 2
    shares = values / values.sum()
    assert health.effective_rank(noise(30, 6)) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-6)


def test_outliers_are_counted():
    patches = noise(2, 5, 10, 64)
    assert health.norm_outliers(patches) == 0.0
    patches[0, 1, 2] *= 9
    patches[1, 0, 0] *= 9
    assert health.norm_outliers(patches) == pytest.approx(0.02)
    wide = noise(4, 8, 8, 32)
    assert 1 <= health.dimension_peak(wide) < 1.3
    wide[..., 5] *= 40
    assert health.dimension_peak(wide) == pytest.approx(40, rel=0.15)


def test_prototype_use_at_its_extremes():
    certain = 100 * torch.eye(6, 10)
    use = health.prototype_use(certain, temperature=0.1)
    assert (use.use, use.information) == pytest.approx((1.0, 1.0))
    assert use.entropy == pytest.approx(0.0, abs=1e-6)
    uniform = health.prototype_use(torch.zeros(6, 10), temperature=0.1)
    assert (uniform.entropy, uniform.information) == pytest.approx((1.0, 0.0), abs=1e-6)
    one = health.prototype_use(certain[:1].expand(6, -1), temperature=0.1)
    assert one.use == pytest.approx(1 / 6)
    assert (one.entropy, one.information) == pytest.approx((0.0, 0.0), abs=1e-6)
    logits = noise(5, 7)
    shares = torch.softmax(logits / 0.5, 1)
    each = float(-(shares * shares.log()).sum(1).mean())
    mean = shares.mean(0)
    whole = float(-(mean * mean.log()).sum())
    found = health.prototype_use(logits, temperature=0.5)
    assert found.entropy == pytest.approx(each / math.log(7), rel=1e-5)
    assert found.information == pytest.approx((whole - each) / math.log(5), rel=1e-4)


def test_distances_between_checkpoints():
    patches = smooth()
    assert health.gram_distance(patches, patches) == pytest.approx(0.0, abs=1e-10)
    assert health.drift(patches, patches) == pytest.approx(0.0, abs=1e-6)
    turn = torch.linalg.qr(noise(16, 16)).Q
    assert health.gram_distance(patches @ turn, patches) == pytest.approx(0.0, abs=1e-9)  # blind to rotations
    assert health.drift(patches @ turn, patches) > 0.5  # and this is not
    unit = torch.nn.functional.normalize(patches.flatten(1, 2), dim=-1)
    other = torch.nn.functional.normalize(noise(4, 64, 16, seed=5), dim=-1)
    expected = (unit @ unit.mT - other @ other.mT).square().mean()
    assert health.gram_distance(patches, other.view(4, 8, 8, 16)) == pytest.approx(float(expected), rel=1e-4)


def test_resolution_agreement_pools_the_finer_map():
    patches = smooth()
    finer = patches.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert health.resolution_agreement(patches, finer) == pytest.approx(1.0, abs=1e-6)
    assert abs(health.resolution_agreement(patches, noise(4, 16, 16, 16, seed=3))) < 0.1


def test_random_features_are_at_the_floor():
    """The control: features without any structure."""
    patches = noise(16, 8, 8, 64)
    assert abs(health.locality(patches)) < 0.02
    assert abs(health.pca_coherence(patches)) < 0.05
    assert abs(health.patch_similarity(patches)) < 0.02
    assert abs(health.cls_patch_similarity(noise(16, 64, seed=2), patches)) < 0.02
    assert abs(health.dense_quality(patches)) < 0.02


def test_spoiled_features_are_told_from_healthy_ones():
    patches, cls = smooth(images=8), noise(8, 16, seed=9)
    noisy = patches + 3 * patches.std() * noise(*patches.shape, seed=4)
    overwritten = 0.01 * patches + cls[:, None, None]
    assert health.locality(patches) > 0.7
    assert health.locality(noisy) < 0.15
    assert health.pca_coherence(patches) > 0.7 > 0.3 > health.pca_coherence(noisy)
    assert health.cls_patch_similarity(cls, overwritten) > 0.99 > 0.3 > health.cls_patch_similarity(cls, patches)
    qualities = [health.dense_quality(p) for p in (patches, noisy, overwritten)]
    assert qualities[0] > 3 * max(qualities[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: health.locality(torch.zeros(2, 1, 4, 8)), r"locality: patches expects \(n >= 1, h >= 2"),
        (lambda: health.pca_coherence(torch.full((2, 2, 2, 3), float("nan"))), "finite numbers"),
        (lambda: health.image_similarity(torch.zeros(1, 3)), "at least 2 images, got 1"),
        (lambda: health.effective_rank(torch.zeros(1, 3)), "n >= 2"),
        (lambda: health.prototype_use(torch.zeros(2, 3), temperature=0.0), "temperature above 0"),
        (lambda: health.gram_distance(torch.zeros(2, 2, 2, 3), torch.zeros(2, 3, 2, 3)), "expects the grid"),
        (lambda: health.drift(torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2, 4)), "reference expects"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(Backbone(embed_dim=32, depth=2, heads=2, patch_size=8, layer_scale=1.0))


def test_panel_spreads_over_the_source_and_steps_over_damage(memory_source):
    panel = open_panel(memory_source(20, damaged=(5, 6)), View(size=16), images=4, patch_size=8)
    assert [int(name.split("/")[1].removesuffix(".png")) for name in panel.names] == [0, 7, 10, 15]
    assert panel.pixels.shape == (4, 3, 16, 16)
    assert panel.finer.shape == (4, 3, 32, 32)


def test_panel_refusals(memory_source):
    view = View(size=16)
    with pytest.raises(ValueError, match="panel: expected at least 4 images, the source has none"):
        open_panel(memory_source(0), view, images=4, patch_size=8)
    with pytest.raises(ValueError, match="panel: expected at least 4 images, the source has 3"):
        open_panel(memory_source(3), view, images=4, patch_size=8)
    with pytest.raises(ValueError, match="panel: expected 4 readable images, got 3 of the 5"):
        open_panel(memory_source(5, damaged=(1, 2)), view, images=4, patch_size=8)
    with pytest.raises(ValueError, match="panel: images expects at least 2, got 1"):
        open_panel(memory_source(5), view, images=1, patch_size=8)
    with pytest.raises(ValueError, match="panel: size: expected a multiple of the patch size 7"):
        open_panel(memory_source(5), view, images=2, patch_size=7)


def test_a_look_takes_every_measure_and_leaves_the_backbone_as_it_was(memory_source, backbone):
    panel = open_panel(memory_source(12), View(size=32), images=6, patch_size=8)
    features = panel_features(backbone.train(), panel)
    assert backbone.training
    assert features.patches.shape == features.raw.shape == (6, 4, 4, 32)
    assert features.finer.shape == (6, 8, 8, 32)
    torch.testing.assert_close(backbone.norm(features.raw), features.patches)
    heads = {"dino_head": torch.nn.Linear(32, 20), "ibot_head": torch.nn.Linear(32, 20)}
    found = measures(features, heads=heads, start=features.patches, previous=noise(6, 4, 4, 32))
    assert found["gram_start"] == pytest.approx(0.0, abs=1e-9)
    assert found["gram_previous"] > 0.01
    assert {"dino_use", "ibot_information", "drift", "locality", "cls_rank"} <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
    assert found == measures(
        panel_features(backbone, panel), heads=heads, start=features.patches, previous=noise(6, 4, 4, 32)
    )
    without = measures(features)
    assert not {"dino_use", "gram_start", "gram_previous", "drift"} & without.keys()


def test_the_photograph_of_a_panel_is_the_views(memory_source):
    source, view = memory_source(4), View(size=16)
    panel = open_panel(source, view, images=2, patch_size=8)
    assert torch.equal(panel.pixels[1], view.pixels(source.image(2)))
    assert Image.fromarray(panel.finer[1].permute(1, 2, 0).numpy()).size == (32, 32)
