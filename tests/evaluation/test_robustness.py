"""Resolutions: agreement of a backbone that does not care, axes against scikit-learn, chance, every refusal."""

import pytest
import torch
from sklearn.decomposition import PCA

from dinov3_train.evaluation.extract import extract
from dinov3_train.evaluation.knn import evaluate_knn
from dinov3_train.evaluation.robustness import (
    RobustnessSettings,
    correlations,
    evaluate_robustness,
    overlap,
    principal_axes,
    scaled,
)
from dinov3_train.evaluation.view import View

VIEW = View(size=32)
SETTINGS = RobustnessSettings(k=3)


def test_sizes_are_whole_patches():
    assert [scaled(VIEW, scale, 8).size for scale in (0.5, 1, 1.3, 4)] == [16, 32, 40, 128]
    both = scaled(View(size=224, short_side=256), 0.5, 16)
    assert (both.size, both.short_side) == (112, 128)
    with pytest.raises(ValueError, match="scales: 0.1 x 32 px is less than one patch of 8 px"):
        scaled(VIEW, 0.1, 8)


def test_axes_are_scikit_learns():
    patches = torch.randn(6, 20, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1, 2, 0.5, 4])
    axes, mean = principal_axes(patches)
    oracle = PCA(3).fit(patches.flatten(0, 1).numpy())
    torch.testing.assert_close((axes.T @ torch.from_numpy(oracle.components_.T)).abs(), torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean, torch.from_numpy(oracle.mean_))


def test_overlap_and_correlation():
    axes = torch.eye(4)[:, :2]
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert overlap(axes, axes @ turn) == pytest.approx(1.0)
    assert overlap(axes, torch.eye(4)[:, 2:]) == 0.0
    maps = torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(correlations(maps, 3 * maps + 5), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(correlations(maps, -maps), -torch.ones(3, dtype=torch.float64))


def test_a_backbone_of_mean_colours_does_not_care(mean_colour, pixel_source):
    result = evaluate_robustness(
        mean_colour(), pixel_source(12, side=64), VIEW, train=pixel_source(12, side=64), settings=SETTINGS
    )
    assert result.details["sizes"] == {"0.5": 16, "1": 32, "2": 64, "4": 128}
    for scale in ("0.5", "2", "4"):
        assert result.metrics[f"cls_agreement@{scale}"].value > 0.99
        assert result.metrics[f"patch_agreement@{scale}"].value > 0.8
    assert result.metrics["pca_stability@2"].value > 0.95
    assert result.details["pca_overlap"]["2"] > 0.99
    assert (result.counts["enlarged@4"], result.counts["enlarged@2"]) == (12, 0)


def test_the_probe_at_scale_1_is_plain_knn(mean_colour, pixel_source):
    train, test = pixel_source(16, side=40, unlabelled=(3,)), pixel_source(10, side=40, unlabelled=(1,))
    result = evaluate_robustness(mean_colour(), test, VIEW, train=train, settings=SETTINGS)
    plain = evaluate_knn(extract(mean_colour(), train, VIEW), extract(mean_colour(), test, VIEW), k=[3]).at(3)
    assert result.metrics["knn@1"].value == plain.mean_per_class
    assert set(result.metrics) >= {"knn@0.5", "knn@2", "knn@4"}


def test_features_without_meaning_do_not_agree(noise, pixel_source):
    result = evaluate_robustness(noise(), pixel_source(40, side=32), VIEW, settings=SETTINGS)
    for scale in ("0.5", "2"):
        found = result.metrics[f"patch_agreement@{scale}"]
        assert found.low <= 0 <= found.high
        found = result.metrics[f"pca_stability@{scale}"]
        assert found.low <= 0 <= found.high
    assert result.details["pca_overlap_by_chance"] == 3 / 8


def test_groups_and_fewer_maps(mean_colour, pixel_source):
    settings = RobustnessSettings(scales=(0.5,), images=6)
    result = evaluate_robustness(mean_colour(), pixel_source(9, side=32), VIEW, settings=settings, group="parity")
    assert result.counts["mapped"] == 6
    assert result.groups.metric == "patch_agreement@0.5"
    assert sum(score.images for score in result.groups.scores.values()) == 6


def test_refusals(mean_colour, pixel_source, memory_source):
    with pytest.raises(ValueError, match="at least one test image, got an empty source"):
        evaluate_robustness(mean_colour(), memory_source(0), VIEW)
    with pytest.raises(ValueError, match="a readable test image, got 2 and none: dark/0.png"):
        evaluate_robustness(mean_colour(), memory_source(2, damaged=(0, 1)), VIEW)
    unlabelled = pixel_source(4, side=32, unlabelled=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="labelled training images, got 4"):
        evaluate_robustness(mean_colour(), pixel_source(4, side=32), VIEW, train=unlabelled)
    with pytest.raises(ValueError, match="k expects numbers from 1 to the 4 training images"):
        evaluate_robustness(mean_colour(), pixel_source(4, side=32), VIEW, train=pixel_source(4, side=32))
    for wrong, message in (
        ({"scales": (1.0,)}, "a factor other than 1"),
        ({"scales": (2.0, 2.0)}, "different factors above 0"),
        ({"scales": (-1.0,)}, "different factors above 0"),
        ({"images": 0}, "images: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RobustnessSettings(**wrong)
