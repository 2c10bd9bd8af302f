"""What the backbone is shown: which part of a photograph, at which size, normalised how."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_train.evaluation.view import AugmentedView, View


def gradient(width: int, height: int) -> Image.Image:
    """Red grows with x, green with y: a pixel's colour tells where it came from."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2).round().astype(np.uint8))


def test_short_side_is_seen_whole_and_the_long_side_is_centred():
    pixels = View(size=32).pixels(gradient(128, 64)).float()  # the middle half of x, all of y
    assert pixels.shape == (3, 32, 32)
    assert pixels[0, :, 0].mean() == pytest.approx(64, abs=3)
    assert pixels[0, :, -1].mean() == pytest.approx(191, abs=3)
    assert pixels[1, 0].mean() < 4
    assert pixels[1, -1].mean() > 251


def test_short_side_above_size_crops_both_axes():
    pixels = View(size=28, short_side=32).pixels(gradient(64, 64)).float()
    assert pixels.shape == (3, 28, 28)
    assert pixels[0, :, 0].mean() == pytest.approx(255 * 2 / 32, abs=4)


def test_squash_cuts_nothing_off():
    pixels = View(size=16, resize="squash").pixels(gradient(80, 40)).float()
    assert pixels[0, :, 0].mean() < 9
    assert pixels[0, :, -1].mean() > 246


def test_an_image_of_the_right_size_is_untouched():
    image = gradient(24, 24)
    assert torch.equal(View(size=24).pixels(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(97, 31), (31, 97), (1, 40), (33, 32)])
def test_odd_sides_give_the_size(width, height):
    assert View(size=32).pixels(gradient(width, height)).shape == (3, 32, 32)


def test_normalised():
    view = View(size=1, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    assert view.normalized(pixels).flatten().tolist() == pytest.approx([1.0, -1.0, 0.2])


def test_refusals():
    with pytest.raises(ValueError, match="size is a side in pixels, expected at least 1, got 0"):
        View(size=0)
    with pytest.raises(ValueError, match="resize expects one of short_side_center_crop, squash, got 'crop'"):
        View(size=8, resize="crop")
    with pytest.raises(ValueError, match=r"short_side expects at least size \(32\), got 16"):
        View(size=32, short_side=16)


def test_the_part_that_is_seen_is_the_part_that_is_cut():
    ramp = np.zeros((60, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(60)[:, None]
    for view in (View(size=60), View(size=30), View(size=40, short_side=60), View(size=20, resize="squash")):
        left, top, right, bottom = view.seen(100, 60)
        pixels = view.pixels(Image.fromarray(ramp)).float()
        # the mean place of the pixels of a view is the middle of the part it shows
        assert float(pixels[0].mean()) == pytest.approx((left + right - 1) / 2, abs=1.0)
        assert float(pixels[1].mean()) == pytest.approx((top + bottom - 1) / 2, abs=1.0)
        spread = float(pixels[0].max() - pixels[0].min())
        assert spread == pytest.approx(right - left, abs=(right - left) / view.size + 3)


def test_augmented_views_are_a_function_of_seed_epoch_and_number():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8))
    first = AugmentedView(size=24, seed=1, epoch=0)
    assert torch.equal(first.pixels_of(image, 5), AugmentedView(size=24, seed=1, epoch=0).pixels_of(image, 5))
    others = (first.pixels_of(image, 6), AugmentedView(size=24, seed=1, epoch=1).pixels_of(image, 5))
    assert all(not torch.equal(first.pixels_of(image, 5), other) for other in others)
    assert first.pixels_of(image, 5).shape == (3, 24, 24)
    whole = AugmentedView(size=24, scale=(1.0, 1.0))
    square = Image.fromarray(np.arange(24 * 24 * 3).reshape(24, 24, 3).astype(np.uint8))
    expected = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    drawn = {number: whole.pixels_of(square, number) for number in range(20)}
    mirrored = [not torch.equal(pixels, expected) for pixels in drawn.values()]
    assert 3 < sum(mirrored) < 17  # the central crop of the only area, as it is or mirrored
    assert View(size=24).pixels_of(image, 3).equal(View(size=24).pixels(image))
