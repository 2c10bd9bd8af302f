"""Linear segmentation: one linear layer from patch features to classes, its logits upsampled to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_train.data.batch import patch_grid
from dinov3_train.evaluation.dense import (
    LinearLayer,
    PatchBank,
    PatchBatch,
    chosen,
    enlarged,
    patch_bank,
    patch_batches,
)
from dinov3_train.evaluation.extract import groups_of
from dinov3_train.evaluation.heads import HeadTraining, best_of, split, train_heads
from dinov3_train.evaluation.measure import ProbeResult, Statistics, by_group, measured, value_of
from dinov3_train.evaluation.reading import warn_unreadable
from dinov3_train.evaluation.targets import VOID, MaskTarget, check_targets, with_target
from dinov3_train.evaluation.view import View

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source


TRAINING = HeadTraining(
    learning_rates=(3e-3, 1e-2, 3e-2),
    weight_decays=(1e-3,),
    optimizer="adamw",
    steps=300,
    batch_size=16,
    warmup=None,
    dropout=0.1,
)


@dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    """How the linear layer is trained and judged.

    training: rates, steps, batch of images; where it names several rates or decays, the pair with the best mIoU on
        `held_out` of the training images is taken and trained again on all of them.
    classes: number of classes; None: the largest class of the training masks plus one. Class 255 is void.
    images: few-shot, this many labelled training images, drawn by `training.seed`; None: all.
    held_out: share of the training images that choose among rates, in (0, 1).
    upsample: values per patch side at which the loss compares logits and masks; the test compares every pixel.
    layer: block whose patches are used, from 0; None: the last.
    precision: of the backbone, "fp32" or "bf16"; images_at_once: that it sees.
    """

    training: HeadTraining = TRAINING
    classes: int | None = None
    images: int | None = None
    held_out: float = 0.1
    upsample: int = 4
    layer: int | None = None
    precision: str = "fp32"
    images_at_once: int = 32


DEFAULTS = SegmentSettings()


@dataclass(frozen=True, kw_only=True)
class SegmentResult(ProbeResult):
    """mIoU and pixel accuracy of the test images; details: IoU of each class, scores of each learning rate.

    image_counts: (n, C, 3) true positives, false positives and false negatives of each test image, not written to JSON.
    """

    image_counts: Tensor = field(compare=False, repr=False)

    def to_dict(self) -> dict:
        """Without `image_counts`."""
        return {key: value for key, value in super().to_dict().items() if key != "image_counts"}

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur in the test masks or predictions."""
        return self.main.value


def evaluate_segment(
    backbone: nn.Module,
    train: Source,
    test: Source,
    view: View,
    *,
    settings: SegmentSettings = DEFAULTS,
    group: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> SegmentResult:
    """Train a linear layer on the frozen patch features of `train`, judge it on every pixel of `test`.

    logits = W (patch - mean) / std + b, on the patch grid, bilinearly upsampled; mean and std per channel over all
    training patches. IoU_c = true positives / (true + false positives + false negatives), summed over all images.

    Args:
        backbone: has `features` and `patch_size`; on any device.
        train, test: sources with a `NAME.mask.png` beside each labelled image; images without one are left out.
        view: size, crop and normalisation.
        settings: of the layer.
        group: name of what the test source says about its images, by which mIoU is also given.
        progress: called with (what, done, in all).

    Errors: ValueError, before any work, for a source without masks, a mask of another size than its image, a class out
        of range, one class only, more few-shot images than there are.
    Source: the linear segmentation of DINOv3 (arXiv 2508.10104, section 6.1.2).
    """
    patch_grid(view.size, backbone.patch_size, "size")
    numbers, test_numbers, classes = _checked(train, test, settings)
    groups = None if group is None else groups_of(test, test_numbers, group)
    report = progress or (lambda what, done, total: None)

    def batches(source: Source, wanted: list[int]) -> Iterator[PatchBatch]:
        return patch_batches(
            backbone,
            source,
            view,
            MaskTarget(),
            numbers=wanted,
            layer=settings.layer,
            precision=settings.precision,
            batch_size=settings.images_at_once,
        )

    bank = patch_bank(
        batches(train, numbers),
        len(numbers),
        upsample=settings.upsample,
        progress=lambda done, total: report("training images", done, total),
    )
    device = next(backbone.parameters()).device
    layer, details = _trained(bank, classes, settings, device, report)
    counts, seen = _test_counts(layer, batches(test, test_numbers), classes, len(test_numbers), report)
    if groups is not None:
        place = {number: index for index, number in enumerate(test_numbers)}
        groups = [groups[place[number]] for number in seen]
    return _result(counts, classes, groups, details, view, settings, (len(bank.patches), len(test) - len(test_numbers)))


def iou_statistics(counts: Tensor) -> Statistics:
    """mIoU from (n, C, 3) true positives, false positives and false negatives per image and class.

    Mean over the classes with any of the three; NaN where there is none.
    """

    def reduce(sums: Tensor) -> Tensor:
        return class_iou(sums).nanmean(dim=1)

    return Statistics(counts, reduce)


def class_iou(sums: Tensor) -> Tensor:
    """(..., C) from (..., C, 3); NaN where a class occurs neither in masks nor in predictions."""
    return sums[..., 0] / sums.sum(dim=-1)


def pixel_statistics(counts: Tensor) -> Statistics:
    """Share of pixels given their class, from (n, C, 3) as above."""
    return Statistics(counts, lambda sums: sums[..., 0].sum(dim=1) / (sums[..., 0] + sums[..., 2]).sum(dim=1))


def chance_iou(counts: Tensor) -> float:
    """mIoU of predictions drawn anew, independent of the image, with the same share of each class as these.

    With class shares t of the truth and p of the predictions, IoU_c = t p / (t + p - t p).
    """
    sums = counts.double().sum(dim=0)
    pixels = (sums[:, 0] + sums[:, 2]).sum()
    truth, predicted = (sums[:, 0] + sums[:, 2]) / pixels, (sums[:, 0] + sums[:, 1]) / pixels
    both = truth * predicted
    return float((both / (truth + predicted - both)).nanmean())


def confusions(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """True positives, false positives, false negatives of each class: (C, 3), of pixels (Y, X) that are not void."""
    from torchmetrics.functional.classification import multiclass_stat_scores  # imports for seconds

    found = multiclass_stat_scores(
        predicted.flatten(), truth.flatten(), num_classes=classes, average=None, ignore_index=VOID, validate_args=False
    )  # (C, 5): tp, fp, tn, fn, support
    return found[:, [0, 1, 3]]


def _checked(train: Source, test: Source, settings: SegmentSettings) -> tuple[list[int], list[int], int]:
    """Training and test images with masks, and the number of classes, all masks having been looked at."""
    sides = []
    for what, source in (("training", train), ("test", test)):
        found = with_target(source, MaskTarget())
        if not found:
            raise ValueError(
                f"segment: expected {what} images with masks (NAME.mask.png beside NAME.jpg, class indices, 255 = "
                f"void), got {len(source)} images without one"
            )
        sides.append(found)
    numbers = chosen(sides[0], settings.images, settings.training.seed)
    seen: set[int] = set()
    check_targets(train, numbers, MaskTarget(), lambda values, name: _look(values, name, settings.classes, seen))
    if len(seen) < 2:
        raise ValueError(
            f"segment: expected at least two classes in the training masks, got {sorted(seen) or 'void pixels only'} "
            f"({VOID} is void)"
        )
    classes = settings.classes or max(seen) + 1
    check_targets(test, sides[1], MaskTarget(), lambda values, name: _look(values, name, classes, set()))
    return numbers, sides[1], classes


def _look(values: Tensor, name: str, classes: int | None, seen: set[int]) -> None:
    """Add the classes of a mask to `seen`. Errors: ValueError for one out of range."""
    found = set(values.unique().tolist()) - {VOID}
    seen |= found
    wrong = sorted(value for value in found if value < 0 or value >= (VOID if classes is None else classes))
    if wrong:
        expected = f"0 to {(VOID if classes is None else classes) - 1}, or {VOID} for void"
        raise ValueError(f"mask of {name}: expected class indices from {expected}, got {wrong[0]}")


def _trained(
    bank: PatchBank, classes: int, settings: SegmentSettings, device: torch.device, report: Callable
) -> tuple[LinearLayer, dict]:
    """The layer of the best learning rate, and the held-out mIoU of each."""
    mean, std = bank.scale(device)
    training, details = settings.training, {}
    if len(training.grid) > 1 and len(bank.patches) > 1:
        kept, held_out = split(len(bank.patches), settings.held_out, training.seed)
        layer = _fit(bank, kept, classes, training, (mean, std), report)
        scores = _held_out_scores(layer, bank, held_out, classes)
        rate, decay = training.grid[best_of(scores)]
        details = {
            "held_out_images": len(held_out),
            "held_out_miou": [
                {"learning_rate": r, "weight_decay": d, "miou": score} for (r, d), score in zip(training.grid, scores)
            ],
        }
    else:  # a single image cannot choose: the middle of the grid
        rate, decay = training.grid[len(training.grid) // 2]
    training = replace(training, learning_rates=(rate,), weight_decays=(decay,))
    layer = _fit(bank, torch.arange(len(bank.patches)), classes, training, (mean, std), report)
    return layer, details | {"learning_rate": rate, "weight_decay": decay}


def _fit(
    bank: PatchBank,
    rows: Tensor,
    classes: int,
    training: HeadTraining,
    scale: tuple[Tensor, Tensor],
    report: Callable,
) -> LinearLayer:
    mean, std = scale

    def batch(numbers: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        taken = rows[numbers]
        return (bank.patches[taken].to(mean.device) - mean) / std, bank.targets[taken].to(mean.device)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        maps = enlarged(logits.mT.unflatten(3, bank.grid), targets.shape[1:])  # (H, b, C, Y, X)
        heads = maps.shape[0]
        each = F.cross_entropy(
            maps.flatten(0, 1), targets.repeat(heads, 1, 1), ignore_index=VOID, reduction="none"
        )  # (H b, Y, X)
        return each.unflatten(0, (heads, -1)).sum(dim=(1, 2, 3)) / (targets != VOID).sum().clamp_min(1)

    heads = train_heads(
        batch,
        loss,
        images=len(rows),
        shape=(classes, bank.patches.shape[2]),
        settings=training,
        device=mean.device,
        progress=lambda done, total: report("linear layers", done, total),
    )
    return LinearLayer(heads, mean, std)


@torch.no_grad()
def _held_out_scores(layer: LinearLayer, bank: PatchBank, rows: Tensor, classes: int) -> list[float]:
    """mIoU of each head on some training images, at the resolution of the loss."""
    counts = [torch.zeros(classes, 3) for _ in range(len(layer.heads.bias))]
    for row in rows.tolist():
        logits = layer.logits(bank.patches[row : row + 1].to(layer.mean.device), bank.grid)
        predicted = enlarged(logits, bank.targets.shape[1:]).argmax(dim=2)[:, 0].cpu()  # (H, Y, X)
        for number, one in enumerate(predicted):
            counts[number] += confusions(one, bank.targets[row], classes)
    return [value_of(iou_statistics(one[None])) for one in counts]


@torch.no_grad()
def _test_counts(
    layer: LinearLayer, batches: Iterator[PatchBatch], classes: int, images: int, report: Callable
) -> tuple[Tensor, list[int]]:
    """(n, C, 3) counts of each test image, in its own pixels, and the images' numbers."""
    counts, seen, unreadable = [], [], []
    for batch in batches:
        unreadable += batch.unreadable
        seen += batch.numbers
        if batch.numbers:
            maps = layer.logits(batch.patches, batch.grid)  # (1, b, C, h, w)
            for number, truth in enumerate(batch.targets):
                predicted = enlarged(maps[:, number : number + 1], truth.shape).argmax(dim=2)[0, 0].cpu()
                counts.append(confusions(predicted, truth, classes))
        report("test images", len(seen) + len(unreadable), images)
    warn_unreadable("segment", unreadable, images)
    if not counts:
        raise ValueError(f"segment: expected at least one readable test image, got {images} and none: {unreadable[0]}")
    return torch.stack(counts), seen


def _result(
    counts: Tensor,
    classes: int,
    groups: list[str | None] | None,
    details: dict,
    view: View,
    settings: SegmentSettings,
    images: tuple[int, int],
) -> SegmentResult:
    miou, sums = iou_statistics(counts), counts.double().sum(dim=0)
    if not sums.sum() > 0:
        raise ValueError("segment: expected test masks with pixels that are not void, got none")
    pixels = sums[:, 0] + sums[:, 2]
    return SegmentResult(
        probe="segment",
        metrics={"miou": measured(miou), "pixel_accuracy": measured(pixel_statistics(counts))},
        chance={"miou": chance_iou(counts), "pixel_accuracy": float((pixels / pixels.sum()).max())},
        counts={
            "train_images": images[0],
            "test_images": len(counts),
            "test_without_mask": images[1],
            "classes": classes,
        },
        settings={**view.to_dict(), **asdict(settings)},
        details={"class_iou": class_iou(sums).tolist(), **details},
        groups=None if groups is None else by_group("miou", miou, groups),
        image_counts=counts,
    )
