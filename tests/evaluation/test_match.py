"""Correspondence: homographies against scikit-image, PCK against loops, chance, every refusal."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import ProjectiveTransform

from dinov3_train.evaluation.match import (
    MatchSettings,
    centres,
    corners,
    evaluate_match,
    evaluate_pairs,
    homography,
    moved,
    read_pairs,
    sampled,
    warped,
)
from dinov3_train.evaluation.view import View

VIEW = View(size=64, resize="squash")
SETTINGS = MatchSettings(images=12)


class Ramp(torch.nn.Module):
    """Patch features = mean colour of the patch."""

    patch_size, embed_dim = 8, 3

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def features(self, images):
        pooled = torch.nn.functional.avg_pool2d(images, 8)

        class Found:
            cls = images.mean(dim=(2, 3))
            patches = pooled.flatten(2).mT
            grid = tuple(pooled.shape[2:])

        return Found


class RampSource:
    """Images whose colour tells the place: red grows to the right, green downwards, blue is what is left."""

    classes = None

    def __init__(self, count: int, side: int = 96):
        self.count, self.side = count, side

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{index}.png"

    def image(self, index):
        ramp = np.linspace(20, 235, self.side)
        red, green = np.meshgrid(ramp, ramp)
        return Image.fromarray(np.stack([red, green, np.full_like(red, 128)], axis=2).astype(np.uint8))

    def read(self, index):
        return self.image(index)

    def field(self, index, name):
        return f"{index % 2}" if name == "half" else None


def test_homography_moves_the_corners_where_it_was_told():
    for index in range(5):
        matrix = homography(3, index, 0.2)
        square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        targets = moved(square, matrix)
        assert ((targets - square).abs() <= 0.2 + 1e-9).all()
        oracle = ProjectiveTransform.from_estimate(square.numpy(), targets.numpy())
        points = torch.rand(20, 2)
        np.testing.assert_allclose(moved(points, matrix).numpy(), oracle(points.double().numpy()), atol=1e-6)
    assert torch.equal(homography(3, 1, 0.2), homography(3, 1, 0.2))
    assert not torch.equal(homography(3, 1, 0.2), homography(3, 2, 0.2))


def test_warped_pixels_are_where_the_homography_says():
    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    pixels[:, 20:23, 40:43] = 255
    matrix = homography(0, 4, 0.15)
    found = warped(pixels, matrix)
    bright = (found[0].float() - 128).clamp_min(0)  # what lies outside is 128
    rows, columns = torch.meshgrid(torch.arange(64.0) + 0.5, torch.arange(64.0) + 0.5, indexing="ij")
    centre = torch.stack([(columns * bright).sum(), (rows * bright).sum()]) / bright.sum()
    expected = moved(torch.tensor([[41.5 / 64, 21.5 / 64]]), matrix)[0] * 64
    torch.testing.assert_close(centre.double(), expected, atol=0.6, rtol=0)
    assert torch.equal(warped(pixels, torch.eye(3, dtype=torch.float64)), pixels)


def test_places_and_interpolation():
    assert centres((1, 2)).tolist() == [[0.25, 0.5], [0.75, 0.5]]
    patches = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    middle = sampled(patches, (1, 2), torch.tensor([[0.5, 0.5], [0.25, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(middle, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))


def test_corners_are_where_the_corners_are():
    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    pixels[:, 16:48, 16:48] = 255
    found = corners(pixels, 4)
    expected = torch.tensor([[16.0, 16.0], [16.0, 48.0], [48.0, 16.0], [48.0, 48.0]]) / 64
    order = found[:, 0].round(decimals=1) * 10 + found[:, 1]
    torch.testing.assert_close(found[order.argsort()], expected.double(), atol=0.04, rtol=0)
    assert corners(torch.full((3, 64, 64), 9, dtype=torch.uint8), 4).shape == (0, 2)


def test_features_that_know_their_place_are_matched():
    result = evaluate_match(Ramp(), RampSource(8), VIEW, settings=replace(SETTINGS, images=None))
    assert result.metrics["pck@0.1"].value > 0.7 > 10 * result.chance["pck@0.1"]
    assert result.metrics["cycle_consistency"].value > 0.8
    assert result.counts["images"] == 8
    assert next(iter(result.metrics)) == "pck@0.1"


def test_pck_equals_loops():
    source, settings = RampSource(1), MatchSettings(images=1, seed=5)
    result = evaluate_match(Ramp(), source, VIEW, settings=settings)
    pixels = VIEW.pixels(source.image(0))
    matrix = homography(5, 0, settings.strength)
    maps = Ramp().features(VIEW.normalized(torch.stack([pixels, warped(pixels, matrix)]))).patches
    right = points = 0
    for row in range(8):
        for column in range(8):
            place = np.array([(column + 0.5) / 8, (row + 0.5) / 8, 1.0])
            there = matrix.numpy() @ place
            x, y = there[0] / there[2], there[1] / there[2]
            if not (0 <= x <= 1 and 0 <= y <= 1):
                continue
            points += 1
            one = maps[0, row * 8 + column]
            scores = [float(one @ other / (one.norm() * other.norm())) for other in maps[1]]
            best = int(np.argmax(scores))
            right += np.hypot((best % 8 + 0.5) / 8 - x, (best // 8 + 0.5) / 8 - y) <= 0.1
    assert result.counts["points"] == points
    assert result.metrics["pck@0.1"].value == pytest.approx(right / points)


def test_random_features_give_chance_within_the_interval(noise, pixel_source):
    result = evaluate_match(noise(), pixel_source(60, side=64), VIEW, settings=replace(SETTINGS, images=None))
    assert "cycle_consistency" not in result.chance  # nearest neighbours are often mutual, whatever the features
    for name in ("pck@0.1", "pck@0.05"):
        assert result.metrics[name].low <= result.chance[name] <= result.metrics[name].high, name


def test_groups_and_spread_images():
    result = evaluate_match(Ramp(), RampSource(9), VIEW, settings=replace(SETTINGS, images=6), group="half")
    assert {name: score.images for name, score in result.groups.scores.items()} == {"0": 3, "1": 3}  # 0, 1, 3, 4, 6, 7


@pytest.fixture
def pairs(tmp_path):
    """Two images of the ramp, the second twice as large and cut at the left, and the JSON that names their points."""
    RampSource(1).image(0).save(tmp_path / "a.png")
    RampSource(1, side=192).image(0).save(tmp_path / "b.png")
    points = [[20, 30], [60, 50], [80, 15]]
    entry = {
        "source": "a.png",
        "target": "b.png",
        "source_points": points,
        "target_points": [[2 * x, 2 * y] for x, y in points],
    }

    def write(*changes):
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps([entry | change for change in changes or ({},)]))
        return path

    return write


def test_keypoint_pairs(pairs):
    result = evaluate_pairs(Ramp(), read_pairs(pairs()), VIEW)
    assert result.metrics["pck@0.1"].value == 1.0
    assert (result.counts["pairs"], result.counts["points"]) == (1, 3)
    narrow = evaluate_pairs(Ramp(), read_pairs(pairs({"reach": 1.0})), VIEW)
    assert narrow.metrics["pck@0.1"].value == 0.0  # 0.1 px
    wrong = {"target_points": [[190, 190], [190, 5], [5, 190]]}
    grouped = evaluate_pairs(Ramp(), read_pairs(pairs({"group": "a"}, {"group": "b", **wrong})), VIEW)
    assert (grouped.groups.worst, grouped.groups.gap) == ("b", 1.0)


def test_pair_refusals(pairs, tmp_path):
    for change, message in (
        ({"source_points": [[1, 2]]}, "pair 0 expects as many source_points as target_points.* got 1 and 3"),
        ({"source_points": [1, 2, 3]}, "pair 0 expects source, target"),
        ({"source_points": [], "target_points": []}, "at least one, got 0 and 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pairs(pairs(change))
    with pytest.raises(ValueError, match="pairs: cannot read .*gone.png"):
        evaluate_pairs(Ramp(), read_pairs(pairs({"target": "gone.png"})), VIEW)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match="a list of at least one pair"):
        read_pairs(tmp_path / "empty.json")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_pairs(tmp_path / "absent.json")
    outside = {"source_points": [[-5, 1]], "target_points": [[1, 1]]}
    with pytest.raises(ValueError, match="keypoints inside the view, got none"):
        evaluate_pairs(Ramp(), read_pairs(pairs(outside)), VIEW)
    with pytest.raises(ValueError, match="at least one pair of images, got none"):
        evaluate_pairs(Ramp(), [], VIEW)


def test_refusals(memory_source):
    with pytest.raises(ValueError, match="at least one image, got an empty source"):
        evaluate_match(Ramp(), RampSource(0), VIEW)
    with pytest.raises(ValueError, match="at least one readable image, got 2 and none: dark/0.png"), pytest.warns():
        evaluate_match(Ramp(), memory_source(2, damaged=(0, 1)), VIEW)
    for wrong, message in (
        ({"images": 0}, "images: expected at least 1, got 0"),
        ({"strength": 0.5}, r"share of the side in \(0, 0.5\), got 0.5"),
        ({"thresholds": (0.2, 0.1)}, "ascending shares"),
        ({"keypoints": 0}, "keypoints: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            MatchSettings(**wrong)
