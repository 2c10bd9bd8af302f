"""Linear depth: errors and loss against loops, depth that patches show, chance without features, every refusal."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov3_train.evaluation.depth import DepthSettings, depth_errors, depth_loss, evaluate_depth
from dinov3_train.evaluation.view import View

VIEW = View(size=32, resize="squash")
SETTINGS = DepthSettings(
    bins=16,
    training=replace(DepthSettings().training, learning_rates=(0.01, 0.03), steps=60, batch_size=8, warmup=5),
)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.fixture
def depth_source(pixel_source, as_png):
    """Images whose bright part is 4 m away and whose dark part 1 m, as 16-bit millimetres."""

    def make(count: int, **settings):
        source = pixel_source(count, side=32, **settings)
        source.extras = {
            (number, "depth.png"): as_png((1000 + 3000 * source.mask(number).astype(np.uint16)).astype(np.uint16))
            for number in range(count)
        }
        return source

    return make


def test_errors_and_loss_equal_loops():
    generator = torch.Generator().manual_seed(0)
    predicted, truth = (torch.rand(5, 6, generator=generator) * 9 + 0.5 for _ in range(2))
    truth[0, :3] = 0  # unknown
    pairs = [(float(predicted[y, x]), float(truth[y, x])) for y in range(5) for x in range(6) if truth[y, x] > 0]
    squares = sum((p - t) ** 2 for p, t in pairs) / len(pairs)
    relative = sum(abs(p - t) / t for p, t in pairs) / len(pairs)
    close = sum(max(p / t, t / p) < 1.25 for p, t in pairs) / len(pairs)
    assert depth_errors(predicted, truth).tolist() == pytest.approx([math.sqrt(squares), relative, close], rel=1e-5)
    logs = [math.log(p) - math.log(t) for p, t in pairs]
    mean = sum(logs) / len(logs)
    expected = math.sqrt(sum((g - mean) ** 2 for g in logs) / len(logs) + 0.15 * mean**2)
    both = depth_loss(torch.stack([predicted, truth.clamp_min(0.1)])[:, None], truth[None])
    assert float(both[0]) == pytest.approx(expected, rel=1e-5)
    assert float(both[1]) < 1e-4


def test_learns_what_the_patches_show(mean_colour, depth_source):
    result = evaluate_depth(mean_colour(), depth_source(24), depth_source(10), VIEW, settings=SETTINGS)
    assert result.metrics["rmse"].value < 0.75 < 1.2 < result.chance["rmse"]
    assert result.metrics["delta_1.25"].value > 0.6
    assert len(result.details["held_out_rmse"]) == 2
    assert result.settings["nearest"] == 1.0
    assert result.settings["farthest"] == 4.0


def test_metres_in_npy_are_the_same_depth(mean_colour, depth_source):
    source = depth_source(8)
    metres = depth_source(8)
    metres.extras = {(n, "depth.npy"): npy((1 + 3 * metres.mask(n)).astype(np.float32)) for n in range(8)}
    results = [evaluate_depth(mean_colour(), one, one, VIEW, settings=SETTINGS) for one in (source, metres)]
    assert results[0].metrics == results[1].metrics


def test_random_features_give_chance(noise, depth_source):
    train, test = depth_source(60), depth_source(80)
    for source, first in ((train, 0), (test, 900)):
        source.extras = {
            (n, "depth.npy"): npy(np.random.default_rng(first + n).uniform(2, 6, (32, 32)).astype(np.float32))
            for n in range(len(source))
        }
    result = evaluate_depth(noise(), train, test, VIEW, settings=SETTINGS)
    # the loss is relative: without knowledge the layer says the geometric mean, the guess is the mean
    assert result.metrics["rmse"].value == pytest.approx(result.chance["rmse"], rel=0.03)
    assert result.metrics["rmse"].low >= 0.99 * 4 / math.sqrt(12)  # nothing can beat the spread of uniform depths


def test_unknown_pixels_and_images_without_depth_are_left_out(mean_colour, depth_source, as_png):
    test = depth_source(6)
    half = np.full((32, 32), 60000, np.uint16)
    half[4:] = 0
    unknown = replaced = dict(test.extras)
    replaced[0, "depth.png"] = None
    replaced[1, "depth.png"] = as_png(half)
    test.extras = unknown
    result = evaluate_depth(mean_colour(), depth_source(8), test, VIEW, settings=SETTINGS, group="parity")
    assert result.counts["test_images"] == 5
    assert result.groups.worst == "odd"  # of which image 1 is 60 m away


def test_refusals_come_before_any_work(mean_colour, depth_source, as_png):
    flat = np.full((32, 32), 1000, np.uint16)
    cases = [
        ("train", {}, "training images with NAME.depth.png .* got 4 images without one"),
        ("test", {}, "test images with NAME.depth.png .* got 4 images without one"),
        ("train", {(1, "depth.png"): as_png(flat[:20])}, "1.png: expected the image's size of 32 x 32 .* got 32 x 20"),
        ("test", {(1, "depth.png"): as_png(flat * 0)}, "1.png: expected pixels of known depth, got none"),
        ("train", {(0, "depth.png"): as_png(flat.astype(np.uint8))}, "expected 16-bit millimetres .* got uint8"),
        ("train", {(n, "depth.png"): as_png(flat) for n in range(4)}, "different depths .* got 1 m everywhere"),
        ("test", {(0, "depth.npy"): b"no"}, "depth of dark/0.png: cannot be read"),
    ]
    for side, extras, message in cases:
        sources = {"train": depth_source(4), "test": depth_source(4)}
        sources[side].extras = extras
        backbone = mean_colour()
        with pytest.raises(ValueError, match=message):
            evaluate_depth(backbone, sources["train"], sources["test"], VIEW, settings=SETTINGS)
        assert backbone.modes == []
    with pytest.raises(ValueError, match="bins: expected at least 2 depths, got 1"):
        DepthSettings(bins=1)
    with pytest.raises(ValueError, match="0 < nearest < farthest in metres, got 5"):
        DepthSettings(nearest=5.0, farthest=2.0)
