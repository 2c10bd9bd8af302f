"""The same images at other resolutions: do features agree, does a probe still work, do the principal maps hold?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_train.data.batch import patch_grid
from dinov3_train.evaluation.extract import UNLABELLED, Extracted, evaluating, extract, forward, groups_of
from dinov3_train.evaluation.knn import evaluate_knn
from dinov3_train.evaluation.labelled import check_sources
from dinov3_train.evaluation.measure import Measured, ProbeResult, by_group, mean_of, measured
from dinov3_train.evaluation.reading import prepared, warn_unreadable
from dinov3_train.evaluation.view import View

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source

COMPONENTS = 3


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings:
    """What is compared.

    scales: factors on the view's side, rounded to whole patches; 1 is what all are compared with.
    images: test images for the agreement of features and the principal maps, spread evenly; None: all.
    k: neighbours of the probe, where training images are given; precision: of the backbone.
    """

    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    images: int | None = 200
    k: int = 10
    precision: str = "fp32"

    def __post_init__(self):
        if not self.scales or min(self.scales) <= 0 or len(set(self.scales)) != len(self.scales):
            raise ValueError(f"scales: expected different factors above 0, got {self.scales}")
        if set(self.scales) == {1.0}:
            raise ValueError("scales: expected a factor other than 1 to compare with, got 1 alone")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images: expected at least 1, got {self.images}")


DEFAULTS = RobustnessSettings()


@dataclass(frozen=True)
class Seen:
    """Images at one scale: cls (n, D) and numbers of n images, patches (m, N, D) on the grid of scale 1 of m of them.

    mapped: numbers of the m images; enlarged: how many of the n are smaller than the view.
    """

    cls: Tensor
    patches: Tensor
    numbers: tuple[int, ...]
    mapped: tuple[int, ...]
    enlarged: int


def evaluate_robustness(
    backbone: nn.Module,
    test: Source,
    view: View,
    *,
    train: Source | None = None,
    settings: RobustnessSettings = DEFAULTS,
    group: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ProbeResult:
    """Features of the same images at several resolutions, compared with those at the view's own.

    For each scale s other than 1: "patch_agreement@s", "cls_agreement@s": cosine similarity to scale 1, patch maps
    being brought to its grid (bilinear, with antialiasing). "pca_stability@s": correlation of the projections of an
    image's patches on the three principal axes of scale 1. With labelled training images "knn@s": mean per class of
    k-NN from training images at scale 1 to test images at scale s. An image smaller than the view is enlarged, which
    adds no detail: counts say how many were.

    Args:
        backbone: has `features` and `patch_size`; on any device.
        test: images, labelled where `train` is given.
        view: at scale 1; train: labelled images for the probe; settings: scales and counts.
        group: name of what the test source says about its images, by which the first metric is also given.
        progress: called with (what, done, in all).

    Errors: ValueError for no readable image, a scale below one patch, or as `evaluate_knn` says.
    """
    if train is not None:
        check_sources("robustness", train, test, group=group, k=settings.k)
    patch, report = backbone.patch_size, progress or (lambda what, done, total: None)
    patch_grid(view.size, patch, "size")
    views = {scale: scaled(view, scale, patch) for scale in sorted({1.0, *settings.scales})}
    if len(test) == 0:
        raise ValueError("robustness: expected at least one test image, got an empty source")
    count = min(settings.images or len(test), len(test))
    mapped = [index * len(test) // count for index in range(count)]
    numbers = mapped if train is None else range(len(test))  # the probe asks for the CLS of all
    side = view.size // patch
    seen = {
        scale: _seen(backbone, test, one, (numbers, mapped), side, settings.precision, _named(report, scale))
        for scale, one in views.items()
    }
    base, others = seen[1.0], [scale for scale in views if scale != 1.0]
    axes, mean = principal_axes(base.patches)
    metrics, overlaps, agreement = {}, {}, {}
    for scale in others:
        found = seen[scale]
        agreement[scale] = F.cosine_similarity(found.patches, base.patches, dim=2).mean(dim=1)
        metrics[f"patch_agreement@{scale:g}"] = measured(mean_of(agreement[scale]))
        metrics[f"cls_agreement@{scale:g}"] = measured(mean_of(F.cosine_similarity(found.cls, base.cls, dim=1)))
        stability = correlations((base.patches - mean) @ axes, (found.patches - mean) @ axes)
        metrics[f"pca_stability@{scale:g}"] = measured(mean_of(stability))
        overlaps[f"{scale:g}"] = overlap(axes, principal_axes(found.patches)[0])
    if train is not None:
        bank = extract(
            backbone,
            train,
            view,
            precision=settings.precision,
            progress=lambda done, total: report("training images", done, total),
        )
        metrics |= {f"knn@{scale:g}": _knn(bank, test, seen[scale], settings.k) for scale in views}
    first = next(iter(metrics))
    groups = None if group is None else groups_of(test, base.mapped, group)
    return ProbeResult(
        probe="robustness",
        metrics=metrics,
        chance={},
        counts={
            "images": len(base.numbers),
            "mapped": len(base.mapped),
            **{f"enlarged@{scale:g}": seen[scale].enlarged for scale in views},
        },
        settings={**view.to_dict(), **asdict(settings)},
        details={
            "sizes": {f"{scale:g}": one.size for scale, one in views.items()},
            "pca_overlap": overlaps,
            "pca_overlap_by_chance": min(COMPONENTS / base.cls.shape[1], 1.0),
        },
        groups=None if groups is None else by_group(first, mean_of(agreement[others[0]]), groups),
    )


def scaled(view: View, scale: float, patch: int) -> View:
    """The view at `scale` times its sides, in whole patches. Errors: ValueError for less than one patch."""
    size = round(view.size * scale / patch) * patch
    if size < patch:
        raise ValueError(f"scales: {scale:g} x {view.size} px is less than one patch of {patch} px")
    short = None if view.short_side is None else max(size, round(view.short_side * size / view.size))
    return replace(view, size=size, short_side=short)


def principal_axes(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(D, 3) orthonormal principal axes of patches (n, N, D), largest variance first, and their mean (D,)."""
    rows = patches.flatten(0, 1).double()
    mean = rows.mean(dim=0)
    centred = rows - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :COMPONENTS]
    return axes.to(patches.dtype), mean.to(patches.dtype)


def overlap(one: Tensor, other: Tensor) -> float:
    """Mean squared cosine of the angles between two subspaces with orthonormal axes (D, r), in [0, 1]."""
    return float((one.double().T @ other.double()).square().sum() / one.shape[1])


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of two maps of several channels (n, N, r), each centred by image and channel: (n,)."""
    a, b = (maps - maps.mean(dim=1, keepdim=True) for maps in (one, other))
    return F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1)


def _seen(
    backbone: nn.Module,
    source: Source,
    view: View,
    numbers: tuple[Sequence[int], Sequence[int]],
    side: int,
    precision: str,
    progress: Callable[[int, int], None],
) -> Seen:
    """Features of images at one scale; numbers = (all, those whose patch maps are kept, brought to (side, side))."""
    numbers, mapped = numbers[0], set(numbers[1])
    cls, patches, found, kept, unreadable, enlarged = [], [], [], [], [], 0
    per_batch = max(1, 32 * side**2 * backbone.patch_size**2 // view.size**2)  # the same tokens at every scale
    reading = prepared(
        source,
        lambda image, *_: (view.pixels(image), min(image.size) < (view.short_side or view.size)),
        numbers=numbers,
        batch_size=per_batch,
    )
    with evaluating(backbone):
        for readable, failed in reading:
            unreadable += failed
            if readable:
                features = forward(backbone, torch.stack([made[0] for _, made in readable]), view, precision)
                here = [number in mapped for number, _ in readable]
                kept += [number for number, _ in readable if number in mapped]
                maps = features.patches[torch.tensor(here)].float().mT.unflatten(2, tuple(features.grid))
                if len(maps) and maps.shape[2:] != (side, side):
                    maps = F.interpolate(maps, (side, side), mode="bilinear", align_corners=False, antialias=True)
                cls.append(features.cls.float().cpu())
                if len(maps):
                    patches.append(maps.flatten(2).mT.cpu())
                found += [number for number, _ in readable]
                enlarged += sum(made[1] for _, made in readable)
            progress(len(found) + len(unreadable), len(numbers))
    if not kept:
        raise ValueError(f"robustness: expected a readable test image, got {len(numbers)} and none: {unreadable[0]}")
    warn_unreadable("robustness", unreadable, len(numbers))
    return Seen(torch.cat(cls), torch.cat(patches), tuple(found), tuple(kept), enlarged)


def _knn(bank: Extracted, test: Source, seen: Seen, k: int) -> Measured:
    """Mean per class of k-NN from training images at scale 1 to the labelled images of a scale."""
    labels = [test.label(number) for number in seen.numbers]
    queries = Extracted(
        features=seen.cls,
        labels=torch.tensor([UNLABELLED if label is None else int(label) for label in labels], dtype=torch.int64),
        names=tuple(test.name(number) for number in seen.numbers),
        classes=None if test.classes is None else tuple(test.classes),
        settings=bank.settings,
    )
    score = evaluate_knn(bank, queries, k=(k,)).scores[0]
    low, high = score.mean_per_class_interval
    return Measured(score.mean_per_class, low, high, len(labels))


def _named(report: Callable[[str, int, int], None], scale: float) -> Callable[[int, int], None]:
    return lambda done, total: report(f"images at {scale:g}x", done, total)
