"""Principal components and cosine maps against closed forms; sheets: what is where, the same bytes each time."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_train.config import Backbone
from dinov3_train.evaluation.maps import cosine_map, patch_at, patch_maps, pca_colors
from dinov3_train.evaluation.pictures import (
    PAPER,
    Strip,
    colored,
    cosine_floor,
    cosine_sheet,
    enlarged,
    pca_sheet,
    ringed,
    sheet,
)
from dinov3_train.evaluation.view import View
from dinov3_train.models.vit import VisionTransformer


def random_maps(*grids: tuple[int, int], width: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(3, 1, width)
    return [torch.randn(*grid, width, generator=generator) * spread + 5 for grid in grids]


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    """A ViT of two narrow blocks with patches of 8 px."""
    torch.manual_seed(0)
    return VisionTransformer(Backbone(embed_dim=32, depth=2, heads=2, patch_size=8, layer_scale=1.0))


def test_pca_is_the_singular_value_decomposition_over_all_maps():
    maps = random_maps((4, 5), (6, 3))
    rows = torch.cat([m.reshape(-1, 7) for m in maps]).double()
    centred = rows - rows.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    expected = (centred @ axes.T).numpy()
    low, high = expected.min(0), expected.max(0)
    expected = ((expected - low) / (high - low) * 255).round()
    colors = pca_colors(maps, percentile=0)
    assert [c.shape for c in colors] == [(4, 5, 3), (6, 3, 3)]
    assert np.abs(np.concatenate([c.reshape(-1, 3) for c in colors]) - expected).max() <= 1


def test_colors_do_not_flip_and_outliers_do_not_wash_them_out():
    maps = random_maps((8, 8))
    turned = [m + 1e-6 * torch.randn(m.shape, generator=torch.Generator().manual_seed(1)) for m in maps]
    assert np.abs(pca_colors(maps)[0].astype(int) - pca_colors(turned)[0]).max() <= 1
    spoiled = maps[0].clone()
    spoiled[0, 0, 0] = 60.0  # 18 standard deviations
    assert (
        pca_colors([spoiled], percentile=2)[0][..., 0].std() > 50 > pca_colors([spoiled], percentile=0)[0][..., 0].std()
    )


def test_features_without_variance_are_grey():
    assert (pca_colors([torch.ones(2, 3, 4)])[0] == 128).all()
    one_axis = torch.zeros(3, 3, 4)
    one_axis[..., 2] = torch.arange(9.0).view(3, 3)
    colors = pca_colors([one_axis], percentile=0)[0]
    assert colors[..., 0].ravel().tolist() == [round(255 * n / 8) for n in range(9)]
    assert (colors[..., 1:] == 128).all()


def test_cosine_map_equals_the_formula():
    features = random_maps((3, 4))[0]
    point = features[1, 2]
    expected = [[float(v @ point / (v.norm() * point.norm())) for v in row] for row in features]
    torch.testing.assert_close(cosine_map(features, (1, 2)), torch.tensor(expected))


def test_points_fall_on_patches():
    assert patch_at((4, 8), (0, 0)) == (0, 0)
    assert patch_at((4, 8), (1, 1)) == (3, 7)
    assert patch_at((4, 8), (0.5, 0.3)) == (1, 4)
    with pytest.raises(ValueError, match=r"shares in \[0, 1\], got \(1.5, 0\)"):
        patch_at((4, 8), (1.5, 0))


def test_refusals(backbone):
    with pytest.raises(ValueError, match=r"got widths \[\]"):
        pca_colors([])
    with pytest.raises(ValueError, match=r"got widths \[4, 7\]"):
        pca_colors([*random_maps((2, 2)), torch.zeros(2, 2, 4)])
    with pytest.raises(ValueError, match="percentile expects"):
        pca_colors(random_maps((2, 2)), percentile=50)
    with pytest.raises(ValueError, match="finite"):
        pca_colors([torch.full((2, 2, 3), float("nan"))])
    with pytest.raises(ValueError, match=r"row in \[0, 3\) and a column in \[0, 4\), got \(3, 0\)"):
        cosine_map(random_maps((3, 4))[0], (3, 0))
    with pytest.raises(ValueError, match=r"at least one for each of 2 images, got \[1, 0\]"):
        cosine_sheet(backbone, [("a", photograph(16, 16)), ("b", photograph(16, 16))], [[(0, 0)], []], View(size=16))
    tile = photograph(8, 8)
    with pytest.raises(ValueError, match=r"one number of tiles each, got \[1, 2\]"):
        sheet([Strip("a", (tile,)), Strip("b", (tile, tile))], title="")
    with pytest.raises(ValueError, match=r"got \[\]"):
        sheet([], title="")


def test_maps_keep_the_aspect_and_the_place(backbone):
    left_red = Image.new("RGB", (95, 50), (200, 30, 30))
    left_red.paste((30, 30, 200), (48, 0, 95, 50))
    entry = patch_maps(backbone.train(), [("two colours", left_red)], View(size=32))[0]
    assert backbone.training
    assert entry.image.size == (64, 32)
    assert entry.grid == (4, 8)
    similar = cosine_map(entry.features, (2, 0))
    assert similar[:, :3].min() > similar[:, 5:].max()  # row-major: the left half is like its own left edge


def test_sheets_are_deterministic_and_hold_photograph_and_map(backbone):
    images = [("wide", photograph(90, 60)), ("tall", photograph(40, 70, seed=1)), ("third", photograph(64, 64, seed=2))]
    first, again = (pca_sheet(backbone, images, View(size=32), tile=96) for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert first.mode == "RGB"
    maps = patch_maps(backbone, images, View(size=32))
    color = pca_colors([entry.features for entry in maps])[0]
    block = enlarged(color, maps[0].image.size, smooth=False).resize((96, 64), Image.Resampling.LANCZOS)
    assert contains(first, block)
    smooth = pca_sheet(backbone, images, View(size=32), tile=96, smooth=True)
    assert smooth.size == first.size
    assert smooth.tobytes() != first.tobytes()
    points = [[(0.2, 0.2), (0.9, 0.9)]] * 3
    cosine = cosine_sheet(backbone, images, points, View(size=32), tile=96)
    assert cosine.tobytes() == cosine_sheet(backbone, images, points, View(size=32), tile=96).tobytes()
    assert cosine.getpixel((0, 0)) == cosine.getpixel((cosine.width - 1, cosine.height - 1)) == PAPER


def contains(paper: Image.Image, block: Image.Image) -> bool:
    pixels, wanted = np.array(paper), np.array(block)
    rows, columns = np.nonzero((pixels == wanted[0, 0]).all(2))
    height, width = wanted.shape[:2]
    corners = [(y, x) for y, x in zip(rows, columns) if y + height <= pixels.shape[0] and x + width <= pixels.shape[1]]
    return any(np.array_equal(pixels[y : y + height, x : x + width], wanted) for y, x in corners)


def test_ring_is_at_the_point_and_leaves_the_rest():
    plain = Image.new("RGB", (80, 80), (90, 90, 90))
    changed = np.abs(np.array(ringed(plain, (20, 60))).astype(int) - 90).sum(2) > 0
    rows, columns = np.nonzero(changed)
    assert abs(rows.mean() - 60) < 1
    assert abs(columns.mean() - 20) < 1
    assert np.ptp(rows) < 12
    assert plain.getpixel((20, 60)) == (90, 90, 90)
    assert not changed[60, 20]
    for corner in ((0, 0), (79, 79), (0, 79)):
        assert ringed(plain, corner, "2").size == (80, 80)


def test_color_scale():
    low = cosine_floor([torch.linspace(0.31, 1, 1000).view(10, 100)])
    assert low == pytest.approx(0.3)
    lightness = colored(np.linspace(0, 1, 11)[None])[0].astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()  # reads without colour
