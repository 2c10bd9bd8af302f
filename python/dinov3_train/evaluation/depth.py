"""Linear depth: one linear layer from patch features to shares of depth bins, their mean upsampled to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
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
from dinov3_train.evaluation.measure import ProbeResult, by_group, mean_of, measured
from dinov3_train.evaluation.reading import warn_unreadable
from dinov3_train.evaluation.targets import DepthTarget, check_targets, with_target
from dinov3_train.evaluation.view import View

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source

TRAINING = HeadTraining(
    learning_rates=(3e-3, 1e-2, 3e-2), weight_decays=(1e-4,), optimizer="adamw", steps=300, batch_size=16, warmup=None
)
MEAN_WEIGHT = 0.15  # of the squared mean log error against its variance
DELTA = 1.25


@dataclass(frozen=True, kw_only=True)
class DepthSettings:
    """How the linear layer is trained and judged.

    training: rates, steps, batch of images; of several pairs the one with the least RMSE on `held_out` of the training
        images is taken and trained again on all of them.
    bins: number of depths, evenly spaced from `nearest` to `farthest` metres; None: the ends of the training depths.
    images: few-shot, this many training images with depth; upsample: values per patch side at which the loss compares;
    layer: block whose patches are used, from 0, None: the last; precision: of the backbone; images_at_once: it sees.
    """

    training: HeadTraining = TRAINING
    bins: int = 64
    nearest: float | None = None
    farthest: float | None = None
    images: int | None = None
    held_out: float = 0.1
    upsample: int = 4
    layer: int | None = None
    precision: str = "fp32"
    images_at_once: int = 32

    def __post_init__(self):
        if self.bins < 2:
            raise ValueError(f"bins: expected at least 2 depths, got {self.bins}")
        ends = self.nearest or 0.0, self.farthest or float("inf")
        if not 0 <= ends[0] < ends[1]:
            raise ValueError(f"nearest, farthest: expected 0 < nearest < farthest in metres, got {ends[0]}, {ends[1]}")


DEFAULTS = DepthSettings()


def evaluate_depth(
    backbone: nn.Module,
    train: Source,
    test: Source,
    view: View,
    *,
    settings: DepthSettings = DEFAULTS,
    group: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ProbeResult:
    """Train a linear layer on frozen patch features of `train` to tell depth, judge it on every pixel of `test`.

    depth = sum_k softmax(W (patch - mean) / std + b)_k d_k on the patch grid, bilinearly upsampled.
    loss = sqrt(var(g) + 0.15 mean(g)^2), g = log depth - log truth over the known pixels of a batch.
    RMSE, |error| / truth and the share within a factor of 1.25 are computed per image and averaged over images.

    Args:
        backbone: has `features` and `patch_size`; on any device.
        train, test: sources with `NAME.depth.png` (16-bit millimetres, 0 = unknown) or `NAME.depth.npy` (metres) beside
            each image; images without one are left out.
        view: size, crop and normalisation; settings: of the layer.
        group: name of what the test source says about its images, by which RMSE is also given.
        progress: called with (what, done, in all).

    Errors: ValueError, before any work, for a source without depth, a map of another size than its image, no known
        pixel, more few-shot images than there are.
    Source: the linear depth of DINOv2 and DINOv3 (arXiv 2304.07193, 2508.10104); the loss is that of Eigen et al.
        (arXiv 1406.2283).
    """
    patch_grid(view.size, backbone.patch_size, "size")
    numbers, test_numbers, settings = _checked(train, test, settings)
    groups = None if group is None else dict(zip(test_numbers, groups_of(test, test_numbers, group)))
    report = progress or (lambda what, done, total: None)

    def batches(source: Source, wanted: list[int]) -> Iterator[PatchBatch]:
        return patch_batches(
            backbone,
            source,
            view,
            DepthTarget(),
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
    layer, details = _trained(bank, settings, next(backbone.parameters()).device, report)
    errors, guesses, seen = _test_errors(
        layer, batches(test, test_numbers), settings, bank.targets, len(test_numbers), report
    )
    rmse = mean_of(errors[:, 0])
    found = None if groups is None else [groups[number] for number in seen]
    return ProbeResult(
        probe="depth",
        metrics={name: measured(mean_of(errors[:, n])) for n, name in enumerate(("rmse", "abs_rel", "delta_1.25"))},
        chance={name: float(guesses[:, n].mean()) for n, name in enumerate(("rmse", "abs_rel", "delta_1.25"))},
        counts={"train_images": len(bank.patches), "test_images": len(seen)},
        settings={**view.to_dict(), **asdict(settings)},
        details=details,
        groups=None if found is None else by_group("rmse", rmse, found, higher_is_better=False),
    )


def depth_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) of each head, g = log predicted - log truth where the truth is known (above 0).

    predicted: (H, b, Y, X), above 0; truth: (b, Y, X). Returns (H,).
    """
    known = truth > 0
    logs = predicted[:, known].log() - truth[known].log()  # (H, pixels)
    if logs.shape[1] == 0:
        return predicted.flatten(1).sum(dim=1) * 0.0
    mean = logs.mean(dim=1)
    return ((logs - mean[:, None]).square().mean(dim=1) + MEAN_WEIGHT * mean.square() + 1e-12).sqrt()


def depth_errors(predicted: Tensor, truth: Tensor) -> Tensor:
    """RMSE in metres, mean |error| / truth, share within a factor of 1.25: (3,), over the known pixels of (Y, X)."""
    from torchmetrics.functional import mean_absolute_percentage_error, mean_squared_error  # slow to import

    known = truth > 0
    guess, real = predicted[known], truth[known]
    ratio = torch.maximum(guess / real, real / guess)
    return torch.stack(
        [
            mean_squared_error(guess, real, squared=False),
            mean_absolute_percentage_error(guess, real),
            (ratio < DELTA).float().mean(),
        ]
    )


def _checked(train: Source, test: Source, settings: DepthSettings) -> tuple[list[int], list[int], DepthSettings]:
    """Training and test images with depth, and settings with both ends; every map has been looked at."""
    found = []
    for what, source in (("training", train), ("test", test)):
        numbers = with_target(source, DepthTarget())
        if not numbers:
            raise ValueError(
                f"depth: expected {what} images with NAME.depth.png (16-bit millimetres) or NAME.depth.npy (metres) "
                f"beside NAME.jpg, got {len(source)} images without one"
            )
        found.append(numbers)
    numbers = chosen(found[0], settings.images, settings.training.seed)
    ends = [float("inf"), 0.0]

    def look(values: Tensor, name: str) -> None:
        known = values[values > 0]
        if not len(known):
            raise ValueError(f"depth of {name}: expected pixels of known depth, got none")
        ends[:] = min(ends[0], float(known.min())), max(ends[1], float(known.max()))

    check_targets(train, numbers, DepthTarget(), look)
    near, far = settings.nearest or ends[0], settings.farthest or ends[1]
    if not near < far:
        raise ValueError(f"depth: expected different depths in the training maps, got {near:g} m everywhere")
    check_targets(test, found[1], DepthTarget(), look)
    return numbers, found[1], replace(settings, nearest=near, farthest=far)


def _depths(layer: LinearLayer, patches: Tensor, grid: tuple[int, int], settings: DepthSettings) -> Tensor:
    """(H, b, 1, h, w) metres."""
    shares = layer.logits(patches, grid).softmax(dim=2)
    centres = torch.linspace(settings.nearest, settings.farthest, settings.bins, device=shares.device)
    return (shares * centres[:, None, None]).sum(dim=2, keepdim=True)


def _trained(
    bank: PatchBank, settings: DepthSettings, device: torch.device, report: Callable
) -> tuple[LinearLayer, dict]:
    """The layer of the best learning rate, and the held-out RMSE of each."""
    training, details = settings.training, {}
    if len(training.grid) > 1 and len(bank.patches) > 1:
        kept, held_out = split(len(bank.patches), settings.held_out, training.seed)
        layer = _fit(bank, kept, settings, training, device, report)
        scores = _held_out_rmse(layer, bank, held_out, settings)
        rate, decay = training.grid[best_of([-score for score in scores])]
        details = {
            "held_out_images": len(held_out),
            "held_out_rmse": [
                {"learning_rate": r, "weight_decay": d, "rmse": s} for (r, d), s in zip(training.grid, scores)
            ],
        }
    else:  # a single image cannot choose: the middle of the grid
        rate, decay = training.grid[len(training.grid) // 2]
    training = replace(training, learning_rates=(rate,), weight_decays=(decay,))
    layer = _fit(bank, torch.arange(len(bank.patches)), settings, training, device, report)
    return layer, details | {"learning_rate": rate, "weight_decay": decay}


def _fit(
    bank: PatchBank,
    rows: Tensor,
    settings: DepthSettings,
    training: HeadTraining,
    device: torch.device,
    report: Callable,
) -> LinearLayer:
    mean, std = bank.scale(device)
    centres = torch.linspace(settings.nearest, settings.farthest, settings.bins, device=device)

    def batch(numbers: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        taken = rows[numbers]
        return (bank.patches[taken].to(device) - mean) / std, bank.targets[taken].to(device)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        depths = (logits.softmax(dim=3) @ centres).unflatten(2, bank.grid)  # (H, b, h, w)
        return depth_loss(enlarged(depths[:, :, None], targets.shape[1:])[:, :, 0], targets)

    heads = train_heads(
        batch,
        loss,
        images=len(rows),
        shape=(settings.bins, bank.patches.shape[2]),
        settings=training,
        device=device,
        progress=lambda done, total: report("linear layers", done, total),
    )
    return LinearLayer(heads, mean, std)


@torch.no_grad()
def _held_out_rmse(layer: LinearLayer, bank: PatchBank, rows: Tensor, settings: DepthSettings) -> list[float]:
    """RMSE of each head on some training images, at the resolution of the loss."""
    found = []
    for row in rows.tolist():
        depths = _depths(layer, bank.patches[row : row + 1].to(layer.mean.device), bank.grid, settings)
        maps = enlarged(depths, bank.targets.shape[1:])[:, 0, 0].cpu()  # (H, Y, X)
        if (bank.targets[row] > 0).any():
            found.append(torch.stack([depth_errors(one, bank.targets[row])[0] for one in maps]))
    return torch.stack(found).mean(dim=0).tolist() if found else [float("nan")] * len(layer.heads.bias)


@torch.no_grad()
def _test_errors(
    layer: LinearLayer,
    batches: Iterator[PatchBatch],
    settings: DepthSettings,
    train_depths: Tensor,
    images: int,
    report: Callable,
) -> tuple[Tensor, Tensor, list[int]]:
    """Errors (n, 3) of each test image in its own pixels, those of always the mean training depth, image numbers."""
    errors, guesses, seen, unreadable, done = [], [], [], [], 0
    usual = train_depths[train_depths > 0].mean()
    for batch in batches:
        unreadable += batch.unreadable
        depths = _depths(layer, batch.patches, batch.grid, settings) if batch.numbers else None
        for place, truth in enumerate(batch.targets):
            if (truth > 0).any():  # the view may show unknown pixels alone
                predicted = enlarged(depths[:, place : place + 1], truth.shape)[0, 0, 0].cpu()
                errors.append(depth_errors(predicted, truth))
                guesses.append(depth_errors(usual.expand_as(truth), truth))
                seen.append(batch.numbers[place])
        done += len(batch.numbers) + len(batch.unreadable)
        report("test images", done, images)
    warn_unreadable("depth", unreadable, images)
    if not errors:
        raise ValueError(f"depth: expected a readable test image of known depth in the view, got {images} without one")
    return torch.stack(errors).double(), torch.stack(guesses).double(), seen
