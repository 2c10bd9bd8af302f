"""Photographs through several backbones: one basis where widths agree, strips of each kind, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_train.config import Backbone
from dinov3_train.evaluation.comparison import Column, attention_strips, column, cosine_picture, shared_colors, strips
from dinov3_train.evaluation.maps import PatchMap, pca_colors
from dinov3_train.evaluation.view import View
from dinov3_train.models.vit import VisionTransformer


def photographs() -> list[tuple[str, Image.Image]]:
    noise = np.random.default_rng(0).integers(0, 255, (2, 6, 8, 3)).astype(np.uint8)
    return [(f"p{n}", Image.fromarray(noise[n]).resize((64, 48), Image.Resampling.BICUBIC)) for n in range(2)]


@pytest.fixture(scope="module")
def columns() -> list[Column]:
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        vit = VisionTransformer(Backbone(embed_dim=32, depth=2, heads=2, patch_size=8, registers=2, layer_scale=1.0))
        found.append(column(f"seed {seed}", vit, photographs(), View(size=32)))
    return found


def plain(seed: int, width: int, name: str = "a") -> Column:
    features = torch.randn(4, 5, width, generator=torch.Generator().manual_seed(seed))
    return Column(f"w{width}s{seed}", (PatchMap(name, Image.new("RGB", (40, 32)), features),))


def test_one_basis_for_columns_of_one_width():
    same = shared_colors([plain(0, 7), plain(0, 7)])
    assert np.array_equal(same[0][0], same[1][0])  # equal features, equal colours, whatever else is there
    together = pca_colors([plain(0, 7).maps[0].features, plain(1, 7).maps[0].features])
    found = shared_colors([plain(0, 7), plain(1, 7)])
    assert np.array_equal(found[1][0], together[1])
    apart = shared_colors([plain(0, 7), plain(1, 9)])
    assert np.array_equal(apart[1][0], pca_colors([plain(1, 9).maps[0].features])[0])


@pytest.mark.parametrize("kind", ["pca", "cosine", "attention"])
def test_strips_stand_beside_the_photograph(columns, kind):
    found = strips(columns, kind=kind, point=(0.2, 0.9))
    assert [strip.caption for strip in found] == ["p0", "p1"]
    for strip in found:
        assert len(strip.tiles) == len(strip.headings) == 3
        assert len({tile.size for tile in strip.tiles}) == 1
        assert strip.headings[1].startswith("seed 0")
        assert np.array(strip.tiles[1]).std() > 5
        assert np.array(strip.tiles[1]).tobytes() != np.array(strip.tiles[2]).tobytes()


def test_the_ringed_patch_is_the_brightest(columns):
    picture, low = cosine_picture(columns[0].maps[0], (0.2, 0.9))
    assert -1 <= low < 1
    light = np.array(picture.convert("L"))[::-1, :][4, 12]  # row -1, column 1 of patches of 8 px, inside the ring
    assert light > 200


def test_attention_of_every_prefix_token(columns):
    vit = VisionTransformer(Backbone(embed_dim=32, depth=2, heads=2, patch_size=8, registers=2, layer_scale=1.0))
    found = attention_strips(vit, photographs()[:1], View(size=32), block=0)
    assert found[0].headings == ("photograph", "CLS", "register 1", "register 2")


def test_refusals(columns):
    with pytest.raises(ValueError, match="a kind of pca, cosine, attention"):
        strips(columns, kind="depth")
    with pytest.raises(ValueError, match="got 'pca' and 0"):
        strips([], kind="pca")
    with pytest.raises(ValueError, match="attention blocks, got none in w7s0"):
        strips([plain(0, 7)], kind="attention")
