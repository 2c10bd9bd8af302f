"""Linear segmentation: IoU against nested loops, a mask that can be learned, chance without features, every refusal."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from dinov3_train.config import Backbone
from dinov3_train.evaluation.measure import value_of
from dinov3_train.evaluation.segment import (
    SegmentSettings,
    chance_iou,
    class_iou,
    confusions,
    evaluate_segment,
    iou_statistics,
    pixel_statistics,
)
from dinov3_train.evaluation.view import View
from dinov3_train.models.convnext import convnext_micro
from dinov3_train.models.vit import VisionTransformer

VIEW = View(size=32, resize="squash")
QUICK = replace(SegmentSettings().training, steps=60, batch_size=8, warmup=5)
SETTINGS = SegmentSettings(training=QUICK)


def random_masks(images: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and truths (n, 9, 7); a tenth of the truth is void, and the last class occurs in neither."""
    generator = torch.Generator().manual_seed(seed)
    predicted, truth = (torch.randint(classes - 1, (images, 9, 7), generator=generator) for _ in range(2))
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
    return predicted, truth


def test_iou_equals_nested_loops_and_torchmetrics():
    predicted, truth = random_masks(5, 4, seed=0)
    counts = torch.stack([confusions(*pair, 4) for pair in zip(predicted, truth)])
    ious, right, total = [], 0, 0
    for c in range(4):
        both = either = 0
        for image in range(5):
            for y in range(9):
                for x in range(7):
                    p, t = int(predicted[image, y, x]), int(truth[image, y, x])
                    if t == 255:
                        continue
                    both += p == c and t == c
                    either += p == c or t == c
                    right += p == t and c == 0
                    total += c == 0
                    # pixels are counted once, in the pass of class 0
        ious.append(both / either if either else float("nan"))
    sums = counts.double().sum(dim=0)
    np.testing.assert_allclose(class_iou(sums).numpy(), ious)
    assert value_of(iou_statistics(counts)) == pytest.approx(np.nanmean(ious))
    assert value_of(pixel_statistics(counts)) == pytest.approx(right / total)
    metric = MulticlassJaccardIndex(4, average=None, ignore_index=255)
    torch.testing.assert_close(metric(predicted, truth)[:3].double(), class_iou(sums)[:3])


def test_chance_is_what_shuffled_predictions_reach():
    predicted, truth = random_masks(40, 5, seed=1)
    predicted[predicted == 3] = 0  # uneven shares
    counts = torch.stack([confusions(*pair, 5) for pair in zip(predicted, truth)])
    shuffled = predicted.flatten()[torch.randperm(predicted.numel(), generator=torch.Generator().manual_seed(0))]
    again = torch.stack([confusions(*pair, 5) for pair in zip(shuffled.view_as(predicted), truth)])
    assert chance_iou(counts) == pytest.approx(value_of(iou_statistics(again)), abs=0.01)


def test_learns_what_the_patches_show(mean_colour, pixel_source):
    result = evaluate_segment(
        mean_colour(), pixel_source(24, side=32), pixel_source(12, side=32), VIEW, settings=SETTINGS
    )
    assert result.miou > 0.95  # the line lies on patch borders; upsampled logits cross it within a pixel or two
    assert result.metrics["pixel_accuracy"].value > 0.97
    assert (result.counts["classes"], result.counts["train_images"], result.counts["test_images"]) == (2, 24, 12)
    assert len(result.details["held_out_miou"]) == 3
    assert result.details["held_out_images"] == 2


def test_logits_are_compared_in_the_masks_own_pixels(mean_colour, pixel_source):
    result = evaluate_segment(
        mean_colour(), pixel_source(8, side=32), pixel_source(8, side=80), VIEW, settings=SETTINGS
    )
    assert result.miou > 0.9
    view = View(size=32, short_side=40)
    cropped = evaluate_segment(
        mean_colour(), pixel_source(8, side=80), pixel_source(8, side=80), view, settings=SETTINGS
    )
    assert cropped.miou > 0.85


def test_void_pixels_count_nowhere(mean_colour, pixel_source, as_png):
    test = pixel_source(6, side=32)
    wrong = [1 - test.mask(number) for number in range(6)]
    for mask in wrong:
        mask[4:] = 255
    test.extras = {(number, "mask.png"): as_png(mask) for number, mask in enumerate(wrong)}
    result = evaluate_segment(mean_colour(), pixel_source(12, side=32), test, VIEW, settings=SETTINGS)
    assert result.miou < 0.1  # the four rows that are left are labelled the wrong way round


def test_random_features_give_chance(noise, pixel_source):
    train, test = pixel_source(60, side=32), pixel_source(120, side=32)
    for source, first in ((train, 0), (test, 1000)):  # masks that no feature could tell
        source.mask = lambda number, first=first: (
            np.random.default_rng(first + number).integers(0, 3, (32, 32)).astype(np.uint8) % 2
        )
    result = evaluate_segment(noise(), train, test, VIEW, settings=SETTINGS)
    assert result.metrics["miou"].low <= result.chance["miou"] <= result.metrics["miou"].high


def test_few_shot_takes_that_many_and_a_larger_draw_holds_the_smaller(mean_colour, pixel_source):
    train, test = pixel_source(10, side=32), pixel_source(4, side=32)
    results = [
        evaluate_segment(mean_colour(), train, test, VIEW, settings=replace(SETTINGS, images=count)) for count in (1, 5)
    ]
    assert [result.counts["train_images"] for result in results] == [1, 5]
    assert results[1].miou > 0.9


def test_images_without_a_mask_are_left_out(mean_colour, pixel_source):
    train, test = pixel_source(10, side=32), pixel_source(6, side=32)
    train.extras = {(3, "mask.png"): None}
    test.extras = {(0, "mask.png"): None, (1, "mask.png"): None}
    result = evaluate_segment(mean_colour(), train, test, VIEW, settings=SETTINGS)
    assert (result.counts["train_images"], result.counts["test_images"]) == (9, 4)
    assert result.counts["test_without_mask"] == 2


def test_groups(mean_colour, pixel_source):
    test = pixel_source(8, side=32)
    test.damaged = (2,)
    with pytest.warns(UserWarning, match="1 of 8 images are unreadable"):
        result = evaluate_segment(
            mean_colour(), pixel_source(8, side=32), test, VIEW, settings=SETTINGS, group="parity"
        )
    assert {name: score.images for name, score in result.groups.scores.items()} == {"even": 3, "odd": 4}
    with pytest.raises(ValueError, match="group: expected a column .* got 'camera', which none of 8 images has"):
        evaluate_segment(mean_colour(), pixel_source(8, side=32), test, VIEW, settings=SETTINGS, group="camera")


def test_the_same_call_gives_the_same_result(mean_colour, pixel_source):
    one, again = (
        evaluate_segment(mean_colour(), pixel_source(6, side=32), pixel_source(4, side=32), VIEW, settings=SETTINGS)
        for _ in range(2)
    )
    assert one == again


def test_refusals_come_before_any_work(mean_colour, pixel_source, as_png):
    rgb = np.zeros((32, 32, 3), np.uint8)
    constant = np.zeros((32, 32), np.uint8)
    every = range(4)
    cases = [
        ({(n, "mask.png"): None for n in every}, "train", "training images with masks .* got 4 images without one"),
        ({(n, "mask.png"): None for n in every}, "test", "test images with masks .* got 4 images without one"),
        (
            {(1, "mask.png"): as_png(constant[:30])},
            "train",
            "1.png: expected the image's size of 32 x 32 .* got 32 x 30",
        ),
        (
            {(1, "mask.png"): as_png(constant[:, :8])},
            "test",
            "1.png: expected the image's size of 32 x 32 .* got 8 x 32",
        ),
        ({(2, "mask.png"): as_png(constant + 2)}, "test", "2.png: expected class indices from 0 to 1, or 255 .* got 2"),
        (
            {(n, "mask.png"): as_png(constant) for n in every},
            "train",
            r"at least two classes .* got \[0\] \(255 is void",
        ),
        ({(n, "mask.png"): as_png(constant + 255) for n in every}, "train", "got void pixels only"),
        ({(0, "mask.png"): as_png(rgb)}, "train", "0.png: expected one channel of class indices, got mode RGB"),
        ({(0, "mask.png"): b"nothing"}, "test", "mask of dark/0.png: cannot be read"),
    ]
    for extras, side, message in cases:
        sources = {"train": pixel_source(4, side=32), "test": pixel_source(4, side=32)}
        sources[side].extras = extras
        backbone = mean_colour()
        with pytest.raises(ValueError, match=message):
            evaluate_segment(backbone, sources["train"], sources["test"], VIEW, settings=SETTINGS)
        assert backbone.modes == []  # the backbone was not asked
    good = pixel_source(4, side=32)
    for settings, message in (
        (replace(SETTINGS, classes=1), "expected class indices from 0 to 0, or 255 for void, got 1"),
        (replace(SETTINGS, images=5), "images: expected 1 to 4, the training images with a target, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_segment(mean_colour(), good, good, VIEW, settings=settings)
    with pytest.raises(ValueError, match="size: expected a multiple of the patch size 8"):
        evaluate_segment(mean_colour(), good, good, View(size=30), settings=SETTINGS)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_layers_of_both_architectures(pixel_source, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = VisionTransformer(Backbone(name="tiny", embed_dim=32, depth=2, heads=2, patch_size=8, layer_scale=1.0))
        backbone = vit.eval() if name == "vit" else convnext_micro(patch_size=8).eval()
    settings = replace(SETTINGS, training=replace(QUICK, steps=10))
    results = [
        evaluate_segment(
            backbone, pixel_source(6, side=32), pixel_source(4, side=32), VIEW, settings=replace(settings, layer=layer)
        )
        for layer in (None, 0)
    ]
    assert results[0].metrics != results[1].metrics
    with pytest.raises(ValueError, match="layers expects"):
        evaluate_segment(
            backbone, pixel_source(6, side=32), pixel_source(4, side=32), VIEW, settings=replace(settings, layer=99)
        )
