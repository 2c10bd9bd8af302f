"""Patch features of images beside what is known of their pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from dinov3_train.counter import permutation
from dinov3_train.evaluation.extract import evaluating, forward
from dinov3_train.evaluation.reading import Companion, prepared, warn_unreadable
from dinov3_train.evaluation.targets import Target, check_size, cut, nearest
from dinov3_train.evaluation.view import View

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source


@dataclass(frozen=True)
class PatchBatch:
    """Some images: patches (b, N, D) fp32 on the backbone's device, row-major on grid (h, w).

    targets: b tensors (Y, X), each in its image's own pixels, of what the view shows; numbers: of the images in their
    source; unreadable: why other images of the batch are missing.
    """

    patches: Tensor
    grid: tuple[int, int]
    targets: list[Tensor]
    numbers: list[int]
    unreadable: list[str]


@dataclass(frozen=True)
class PatchBank:
    """All patches (n, N, D) fp32 CPU and the targets (n, Y, X) at one size, of n images with these numbers."""

    patches: Tensor
    grid: tuple[int, int]
    targets: Tensor
    numbers: tuple[int, ...]


def patch_batches(
    backbone: nn.Module,
    source: Source,
    view: View,
    target: Target,
    *,
    numbers: Sequence[int],
    layer: int | None = None,
    precision: str = "fp32",
    batch_size: int = 32,
) -> Iterator[PatchBatch]:
    """Patch features and pixel targets of images `numbers` of a source, in order.

    layer: number of the block whose patches are taken, with the final norm; None: the last.
    Unreadable images are left out and named in their batch. Errors: ValueError for a target of another size.
    """

    def pixels_and_target(image: Image.Image, beside: Companion | None, name: str) -> tuple[Tensor, Tensor]:
        values = target.read(beside, name)
        check_size(values, image.size, name)
        return view.pixels(image), cut(values, view)

    reading = prepared(source, pixels_and_target, numbers=numbers, companions=target.suffixes, batch_size=batch_size)
    with evaluating(backbone):
        for readable, failed in reading:
            if readable:
                pixels = torch.stack([made[0] for _, made in readable])
                features = forward(backbone, pixels, view, precision, layer)
                targets = [made[1] for _, made in readable]
                found = [number for number, _ in readable]
                yield PatchBatch(features.patches.float(), tuple(features.grid), targets, found, failed)
            elif failed:
                yield PatchBatch(torch.empty(0), (0, 0), [], [], failed)


def patch_bank(
    batches: Iterator[PatchBatch], images: int, *, upsample: int, progress: Callable[[int, int], None] | None = None
) -> PatchBank:
    """All batches in memory, targets at `upsample` values per patch side.

    Unreadable images are named in one warning. Errors: ValueError when there is no readable image.
    """
    patches, targets, numbers, unreadable, grid = [], [], [], [], (0, 0)
    for batch in batches:
        unreadable += batch.unreadable
        if batch.numbers:
            grid = batch.grid
            patches.append(batch.patches.cpu())
            sides = grid[0] * upsample, grid[1] * upsample
            targets += [nearest(values, sides) for values in batch.targets]
            numbers += batch.numbers
        if progress is not None:
            progress(len(numbers) + len(unreadable), images)
    warn_unreadable("extract", unreadable, images)
    if not numbers:
        first = f"; first: {unreadable[0]}" if unreadable else ""
        raise ValueError(f"extract: expected at least one readable image, got {images} and none{first}")
    return PatchBank(torch.cat(patches), grid, torch.stack(targets), tuple(numbers))


def chosen(numbers: Sequence[int], images: int | None, seed: int) -> list[int]:
    """`images` of these numbers drawn at random, in ascending order; all of them for None.

    A larger draw of one seed holds the smaller one. Errors: ValueError for more than there are, or fewer than 1.
    """
    if images is None:
        return list(numbers)
    if not 1 <= images <= len(numbers):
        raise ValueError(f"images: expected 1 to {len(numbers)}, the training images with a target, got {images}")
    return sorted(numbers[place] for place in permutation(seed, "evaluation/images", len(numbers))[:images])
