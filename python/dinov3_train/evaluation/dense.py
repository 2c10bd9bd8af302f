"""Patch features of images beside what is known of their pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3_train.counter import permutation
from dinov3_train.evaluation.extract import evaluating, forward
from dinov3_train.evaluation.heads import Heads
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

    def scale(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (D,) of each channel over all patches."""
        flat = self.patches.flatten(0, 1)  # (n N, D)
        return flat.mean(dim=0).to(device), flat.std(dim=0).clamp_min(1e-6).to(device)


@dataclass(frozen=True)
class LinearLayer:
    """Heads on standardised patches: mean, std (D,)."""

    heads: Heads
    mean: Tensor
    std: Tensor

    def logits(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches (b, N, D) -> (H, b, C, h, w)."""
        return self.heads((patches - self.mean) / self.std).mT.unflatten(3, grid)


def enlarged(maps: Tensor, sides: tuple[int, int]) -> Tensor:
    """Maps (H, b, C, h, w) bilinearly at (height, width)."""
    found = F.interpolate(maps.flatten(0, 1), size=tuple(sides), mode="bilinear", align_corners=False)
    return found.unflatten(0, maps.shape[:2])


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

    def pixels_and_target(image: Image.Image, beside: Companion | None, name: str, _: int) -> tuple[Tensor, Tensor]:
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
        if batch.numbers and not numbers:
            _check_memory(batch.patches[0].numel() * 4 * images)
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


def _check_memory(needed: int) -> None:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * available:
        raise ValueError(
            f"images: the patch features of all training images need {needed / 2**30:.0f} GiB and this machine has "
            f"{available / 2**30:.0f}; take fewer with images=N or a smaller size="
        )


def chosen(numbers: Sequence[int], images: int | None, seed: int) -> list[int]:
    """`images` of these numbers drawn at random, in ascending order; all of them for None.

    A larger draw of one seed holds the smaller one. Errors: ValueError for more than there are, or fewer than 1.
    """
    if images is None:
        return list(numbers)
    if not 1 <= images <= len(numbers):
        raise ValueError(f"images: expected 1 to {len(numbers)}, the training images with a target, got {images}")
    return sorted(numbers[place] for place in permutation(seed, "evaluation/images", len(numbers))[:images])
