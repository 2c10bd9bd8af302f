"""The stream of batches: one `CropBatch` per micro-batch, the same bits for any number of workers, from any step on."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .. import counter
from ..config import Crops, Masking
from .augmentation import MultiCrop
from .batch import CropBatch, Views, collate, patch_grid
from .decode import UnreadableImage, decode
from .masking import block_masks, step_counts
from .resolutions import resolution, resolutions
from .sampler import BatchPlan, Sampler
from .sources import Source

UNREADABLE_IN_A_ROW = 100  # then the source as a whole is taken to be broken


def make_loader(
    source: Source,
    crops: Crops,
    masking: Masking,
    *,
    batch: BatchPlan,
    patch_size: int,
    start_step: int,
    steps: int,
    workers: int,
    mask_grid: int | None = None,
) -> CropLoader:
    """An iterable over the batches of steps [start_step, steps): `batch.accumulate` records per step, in order.

    source: images (fewer than a batch are allowed: epochs wrap within it); patch_size: pixels, divides every crop side;
    workers: processes that decode, 0 for none; mask_grid: patches along a side of the masks, where it is not the global
    crop's own. Errors: sides that do not divide, a plan that does not divide.
    """
    sizes = []
    for _, each in resolutions(crops):
        grid = patch_grid(each.global_size, patch_size, "crops.global_size")
        if each.locals:
            patch_grid(each.local_size, patch_size, "crops.local_size")
        if each.gram_size is not None:
            patch_grid(each.gram_size, patch_size, "crops.gram_size")
        sizes.append(_Sizes(MultiCrop(each), grid if mask_grid is None else mask_grid))
    if workers < 0:
        raise ValueError(f"make_loader: workers must be at least 0, got {workers}")
    batches = _Batches(source, crops, tuple(sizes), masking, batch, source.sampler(batch.seed, batch.batch_size))
    micro_batches = range(start_step * batch.accumulate, steps * batch.accumulate)
    return CropLoader(batches, micro_batches, workers)


class CropLoader:
    """Iterates over the batches of a range of micro-batches; each pass starts at its beginning.

    Workers are forked on Linux: the index of the images is shared, and a start costs milliseconds instead of the
    seconds of a fresh import. They touch neither CUDA nor threads, so a parent that does is no danger. Elsewhere they
    are spawned; everything handed to them can be pickled.
    """

    def __init__(self, batches: _Batches, micro_batches: range, workers: int) -> None:
        self._micro_batches = micro_batches
        parallel = {"multiprocessing_context": "fork" if sys.platform == "linux" else "spawn", "prefetch_factor": 2}
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=micro_batches,
            num_workers=workers,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader draws its seed from the global state, a hidden side effect
            **(parallel if workers else {}),
        )

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[CropBatch]:
        loaded = iter(self._loader)
        for micro_batch in self._micro_batches:
            try:
                batch = next(loaded)
            except RuntimeError as error:
                if not re.search(r"DataLoader worker .*(exited|killed)", str(error)):
                    raise
                raise RuntimeError(
                    f"loader: a worker process died while micro-batch {micro_batch} was being made ({error}); "
                    "usual causes: memory ran out, or /dev/shm is too small (docker: --ipc=host or --shm-size); "
                    "fewer data.workers need less of both"
                ) from error
            yield batch


@dataclass(frozen=True)
class _Sizes:
    """The crops of one resolution, and the patches along a side of its global crops."""

    multi_crop: MultiCrop
    grid: int


@dataclass(frozen=True)
class _Batches(Dataset):
    """Micro-batch n of this rank, as a pure function of n; every worker makes crops of every resolution."""

    source: Source
    crops: Crops
    sizes: tuple[_Sizes, ...]
    masking: Masking
    plan: BatchPlan
    sampler: Sampler

    def __getitem__(self, number: int) -> CropBatch:
        step, micro_batch = divmod(number, self.plan.accumulate)
        indices = self.plan.indices(step, micro_batch)  # (B,)
        sizes = self.sizes[resolution(self.crops, seed=self.plan.seed, step=step)]
        views, names, skipped = [], [], []
        for index in indices:
            view, name = self._view(int(index), sizes.multi_crop, skipped)
            views.append(view)
            names.append(name)
        masks = self._masks(step, micro_batch, indices, sizes.grid)
        return collate(views, masks, indices=indices, names=names, skipped=skipped)

    def _view(self, index: int, multi_crop: MultiCrop, skipped: list[str]) -> tuple[Views, str]:
        """Crops of sample `index` and its image's name; the next in the order stands in for an unreadable image."""
        attempts = min(self.sampler.candidates(index), UNREADABLE_IN_A_ROW)
        for skip in range(attempts):
            number = self.sampler.image(index, skip=skip)
            name = self.source.name(number)
            try:
                image = decode(self.source.read(number), name, reduction=multi_crop.reduction)
            except (UnreadableImage, OSError) as error:
                skipped.append(str(error) if isinstance(error, UnreadableImage) else f"{name}: {error}")
                continue
            return multi_crop(image, counter.image_seed(self.plan.seed, "crops", index)), name
        listed = "\n  ".join(skipped[-attempts:][:10])
        raise ValueError(f"data: {attempts} images in a row are unreadable, the first:\n  {listed}")

    def _masks(self, step: int, micro_batch: int, indices: np.ndarray, grid: int) -> np.ndarray:
        """Masks of this rank's crops: bool (G, B, N), N = grid^2."""
        copies, plan = self.crops.globals, self.plan
        patches = grid * grid
        counts = step_counts(plan.seed, step, crops=copies * plan.batch_size, patches=patches, masking=self.masking)
        first = plan.first(micro_batch)
        counts = counts.reshape(copies, plan.batch_size)[:, first : first + plan.images]  # (G, B)
        crops = indices[None, :] * copies + np.arange(copies)[:, None]  # (G, B)
        masks = block_masks(counts.ravel(), (grid, grid), seed=plan.seed, crops=crops.ravel())
        return masks.reshape(copies, len(indices), patches)


def _start_worker(_: int) -> None:
    """One thread per worker; signals are the main process's business: it saves a checkpoint, then ends the workers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class UnreadableCount:
    """Collects the names of unreadable images, each once, and stops the run when they are too many.

    size: images of the source; limit: share of them that may be unreadable. One image is always allowed where the
    limit is above 0, so that a single bad file in a small folder is reported and no more.
    """

    def __init__(self, size: int, limit: float) -> None:
        self.names: list[str] = []
        self._size = size
        self._limit = limit

    def add(self, skipped: tuple[str, ...]) -> list[str]:
        """The entries of `CropBatch.skipped` not seen before; ValueError with the list once the limit is passed."""
        new = list(dict.fromkeys(entry for entry in skipped if entry not in self.names))
        self.names += new
        allowed = max(1.0, self._limit * self._size) if self._limit > 0 else 0.0
        if len(self.names) > allowed:
            listed = "\n  ".join(self.names)
            raise ValueError(
                f"data: {len(self.names)} of {self._size} images are unreadable, more than the allowed share "
                f"data.max_unreadable = {self._limit:g}:\n  {listed}"
            )
        return new
