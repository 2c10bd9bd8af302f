"""Multi-crop: the operators are torchvision's, the draws have its distributions, and the global state is left alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dinov3_train import counter
from dinov3_train.config import Crops
from dinov3_train.data import augmentation
from dinov3_train.data.augmentation import DRAWS, MultiCrop, crop_box, gaussian_blur, solarize

PLAIN = Crops(
    locals=3,
    global_size=32,
    local_size=16,
    horizontal_flip=0.0,
    color_jitter_probability=0.0,
    grayscale=0.0,
    solarize=0.0,
)


@pytest.fixture
def no_blur(monkeypatch):
    monkeypatch.setitem(augmentation.BLUR, "paper", (0.0, 0.0, 0.0))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def draws(count: int) -> np.ndarray:
    return counter.uniform(0, "test", np.arange(count), DRAWS)


def test_sides_types_and_counts():
    views = MultiCrop(Crops(globals=2, locals=6, global_size=64, local_size=32, gram_size=96))(picture(0), 1)
    assert [tuple(crop.shape) for crop in views.global_crops] == [(3, 64, 64)] * 2
    assert [tuple(crop.shape) for crop in views.local_crops] == [(3, 32, 32)] * 6
    assert [tuple(crop.shape) for crop in views.gram_crops] == [(3, 96, 96)] * 2
    assert {crop.dtype for crop in views.global_crops + views.local_crops + views.gram_crops} == {torch.uint8}
    none = MultiCrop(Crops(globals=1, locals=0, global_size=16))(picture(0), 1)
    assert len(none.global_crops) == 1
    assert none.local_crops == none.gram_crops == []


def test_the_seed_decides_everything_and_nothing_global_changes():
    multi_crop, image = MultiCrop(Crops(global_size=32, local_size=16)), picture(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate(), image.tobytes()
    first = multi_crop(image, 7)
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate(), image.tobytes()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(99)
    again, other = multi_crop(image, 7), multi_crop(image, 8)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.global_crops + first.local_crops, again.global_crops + again.local_crops)
    )
    assert not torch.equal(first.global_crops[0], other.global_crops[0])


@pytest.mark.parametrize("seed", range(6))
def test_color_operators_are_torchvisions_bit_for_bit(seed):
    image, amount = picture(seed, 48, 40), 0.4 + 0.25 * seed
    assert (pixels(augmentation.brightness(image, amount)) == pixels(functional.adjust_brightness(image, amount))).all()
    assert (pixels(augmentation.contrast(image, amount)) == pixels(functional.adjust_contrast(image, amount))).all()
    assert (pixels(augmentation.saturation(image, amount)) == pixels(functional.adjust_saturation(image, amount))).all()
    for shift in (-0.1 + 0.04 * seed, -0.5, 0.5):
        assert (pixels(augmentation.hue(image, shift)) == pixels(functional.adjust_hue(image, shift))).all()
    assert (solarize(np.array(image)) == pixels(functional.solarize(image, 128))).all()
    assert (pixels(image.convert("L").convert("RGB")) == pixels(functional.rgb_to_grayscale(image, 3))).all()


@pytest.mark.parametrize("sigma", [0.1, 0.37, 1.0, 2.0])
@pytest.mark.parametrize("size", [(32, 32), (64, 40), (5, 9)])
def test_blur_is_torchvisions_to_a_level(size, sigma):
    image = picture(2, *size)
    difference = np.abs(
        gaussian_blur(np.array(image), sigma) - pixels(functional.gaussian_blur(image, [9, 9], [sigma] * 2))
    )
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3  # fp32 sums in another order, at halves


def test_blur_of_a_side_within_the_radius_is_an_error():
    with pytest.raises(ValueError, match="sides above 4 pixels, got 4 x 9"):
        gaussian_blur(np.zeros((9, 4, 3), dtype=np.uint8), 1.0)


def test_a_crop_is_torchvisions_resized_crop(no_blur):
    image = picture(4, 90, 70)
    multi_crop = MultiCrop(PLAIN)
    views = multi_crop(image, 11)
    rows = counter.uniform(11, "augmentation", np.arange(5), DRAWS)
    for number, crop in enumerate(views.global_crops + views.local_crops):
        scale, side = ((0.32, 1.0), 32) if number < 2 else ((0.05, 0.32), 16)
        left, top, width, height = crop_box(rows[number], 90, 70, scale)
        expected = functional.resized_crop(
            image, top, left, height, width, [side, side], interpolation=functional.InterpolationMode.BICUBIC
        )
        assert torch.equal(crop, functional.pil_to_tensor(expected))
        mirrored = MultiCrop(replace(PLAIN, horizontal_flip=1.0))(image, 11)
        assert torch.equal((mirrored.global_crops + mirrored.local_crops)[number], crop.flip(-1))


@pytest.mark.parametrize(
    ("size", "scale"), [((160, 120), (0.32, 1.0)), ((160, 120), (0.05, 0.32)), ((60, 240), (0.32, 1.0))]
)
def test_boxes_have_torchvisions_distribution(size, scale):
    count = 3000
    mine = np.array([crop_box(row, *size, scale) for row in draws(count)], dtype=float)
    torch.manual_seed(0)
    transform, image = v2.RandomResizedCrop(8, scale=scale), torch.zeros(3, size[1], size[0])
    keys = ("left", "top", "width", "height")
    theirs = np.array([[transform.make_params([image])[key] for key in keys] for _ in range(count)], dtype=float)
    assert (mine[:, :2] >= 0).all()
    assert (mine[:, 0] + mine[:, 2] <= size[0]).all()
    assert (mine[:, 1] + mine[:, 3] <= size[1]).all()
    for column in range(4):
        grid = np.unique(np.concatenate([mine[:, column], theirs[:, column]]))
        shares = [np.searchsorted(np.sort(sample[:, column]), grid, side="right") / count for sample in (mine, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * (2 / count) ** 0.5  # Kolmogorov-Smirnov at 1e-3


@pytest.mark.parametrize("size", [(300, 10), (10, 300), (1, 1)])
def test_images_too_long_for_any_box_give_the_central_one(size):
    width, height = size
    left, top, columns, rows = crop_box(draws(1)[0], width, height, (0.9, 1.0))
    assert 0 <= left
    assert left + columns <= width
    assert 0 <= top
    assert top + rows <= height
    assert (columns, rows) == {(300, 10): (13, 10), (10, 300): (10, 13), (1, 1): (1, 1)}[size]
    assert abs((width - columns) / 2 - left) <= 0.5
    assert abs((height - rows) / 2 - top) <= 0.5
    MultiCrop(PLAIN)(picture(0, *size), 3)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_gram_crop_shares_its_geometry_and_keeps_its_colors(no_blur, flip):
    crops = replace(PLAIN, gram_size=64, horizontal_flip=flip)
    image = picture(6, 100, 90)
    colored = MultiCrop(replace(crops, color_jitter_probability=1.0, grayscale=1.0, solarize=1.0))(image, 5)
    plain = MultiCrop(crops)(image, 5)
    for number in range(2):
        assert torch.equal(colored.gram_crops[number], plain.gram_crops[number])
        gram = Image.fromarray(plain.gram_crops[number].permute(1, 2, 0).numpy())
        resized = functional.pil_to_tensor(gram.resize((32, 32), Image.Resampling.BICUBIC))
        assert torch.equal(plain.global_crops[number], resized)
        assert not torch.equal(colored.global_crops[number], resized)


@pytest.mark.parametrize(("blur", "expected"), [("paper", (1.0, 0.1, 0.5)), ("released", (0.0, 0.9, 0.5))])
def test_blur_probabilities_are_those_of_their_name(monkeypatch, blur, expected):
    seen = []
    monkeypatch.setattr(
        augmentation, "gaussian_blur", lambda array, sigma: seen.append((array.shape[0], sigma)) or 255 - array
    )
    multi_crop, count = MultiCrop(replace(PLAIN, locals=1, blur=blur)), 600
    blurred = np.zeros(3)
    for seed in range(count):
        plain = MultiCrop.__call__(multi_crop, picture(1), seed)
        mean = [float(crop.float().mean()) for crop in plain.global_crops + plain.local_crops]
        monkeypatch.setitem(augmentation.BLUR, blur, (0.0, 0.0, 0.0))
        base = MultiCrop.__call__(multi_crop, picture(1), seed)
        monkeypatch.setitem(augmentation.BLUR, blur, expected)
        blurred += [m != float(c.float().mean()) for m, c in zip(mean, base.global_crops + base.local_crops)]
    assert np.abs(blurred / count - expected).max() < 0.08  # 600 draws of .5: 4 sigma
    sigmas = np.array([sigma for _, sigma in seen])
    assert 0.1 <= sigmas.min() < 0.15
    assert 1.95 < sigmas.max() <= 2.0
    assert abs(sigmas.mean() - 1.05) < 0.1


def test_solarize_falls_on_later_global_crops_only(no_blur):
    image = picture(3)
    plain = MultiCrop(PLAIN)(image, 1)
    inverted = MultiCrop(replace(PLAIN, solarize=1.0))(image, 1)
    assert torch.equal(plain.global_crops[0], inverted.global_crops[0])
    assert torch.equal(plain.local_crops[0], inverted.local_crops[0])
    expected = functional.solarize(plain.global_crops[1], 128)
    assert torch.equal(inverted.global_crops[1], expected)
    assert not torch.equal(expected, plain.global_crops[1])


def test_jitter_and_grey_have_their_shares_and_ranges(monkeypatch, no_blur):
    seen = {name: [] for name in ("brightness", "contrast", "saturation", "hue")}
    originals = augmentation.COLORS
    recorded = [lambda image, x, f=f: seen[f.__name__].append(x) or f(image, x) for f in originals]
    monkeypatch.setattr(augmentation, "COLORS", tuple(recorded))
    multi_crop = MultiCrop(replace(PLAIN, locals=2, color_jitter_probability=0.8, grayscale=0.2))
    grey = 0
    for seed in range(400):
        views = multi_crop(picture(1, 24, 24), seed)
        for crop in views.global_crops + views.local_crops:
            grey += bool(torch.equal(crop[0], crop[1]) and torch.equal(crop[0], crop[2]))
    assert abs(grey / 1600 - 0.2) < 0.04
    assert abs(len(seen["hue"]) / 1600 - 0.8) < 0.04  # 4 sigma
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values, width = np.array(seen[name]), high - low
        assert low <= values.min() < low + 0.02 * width
        assert high - 0.02 * width < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.035 * width  # 1280 draws: 4 sigma


def test_all_orders_of_the_jitter_occur():
    picked = [int(row[augmentation.ORDER] * 24) for row in draws(2000)]
    counts = np.bincount(picked, minlength=24)
    assert counts.min() > 45
    assert counts.max() < 125  # mean 83, 4 sigma 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blur": "both"}, "crops.blur: expected one of paper, released, none, got 'both'"),
        ({"globals": 0}, "globals >= 1"),
        ({"local_scale": (0.0, 0.3)}, "crops.local_scale: expected 0 < low <= high <= 1"),
        ({"global_scale": (0.9, 0.3)}, "crops.global_scale"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(replace(Crops(), **change))
