"""What a training step receives: crops, masks and indices of one rank's images, in one frozen record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Views:
    """All crops of one image, each uint8 (3, side, side); `gram_crops` is empty when no Gram side is set."""

    global_crops: list[Tensor]
    local_crops: list[Tensor]
    gram_crops: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """The crops of B images of one rank, crop-major: first crop 1 of every image, then crop 2.

    masks marks the patches hidden from the student; mask_indices are their places in the flattened (G*B*N) patches and
    mask_weights one over the number of masked patches of their crop. indices are global sample indices:
    step * batch size + position in the global batch. names are the images really read; skipped holds "name: reason" of
    each image found unreadable on the way.
    """

    global_crops: Tensor  # (G, B, 3, Y, X) uint8
    local_crops: Tensor | None  # (L, B, 3, y, x) uint8
    gram_crops: Tensor | None  # (G, B, 3, Y', X') uint8
    masks: Tensor  # (G, B, N) bool
    mask_indices: Tensor  # (M,) int64
    mask_weights: Tensor  # (M,) fp32
    indices: Tensor  # (B,) int64
    names: tuple[str, ...]  # B
    skipped: tuple[str, ...]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> CropBatch:
        """The same batch on `device`; `indices` stay on the host, where they seed the draws of the step."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), keep=("indices",))

    def pin_memory(self) -> CropBatch:
        """The same batch in page-locked memory; the data loader calls this by name."""
        return self._with_tensors(Tensor.pin_memory, keep=("indices",))

    def _with_tensors(self, change: Callable[[Tensor], Tensor], keep: Sequence[str]) -> CropBatch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in keep}
        return replace(self, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)})


def collate(
    views: Sequence[Views], masks: np.ndarray, *, indices: np.ndarray, names: Sequence[str], skipped: Sequence[str]
) -> CropBatch:
    """One `CropBatch` from the views of B images and their masks.

    views: B records; masks: bool (G, B, N); indices: int64 (B,); names: B; skipped: "name: reason" of images not read.
    """
    hidden = torch.from_numpy(masks)  # (G, B, N)
    per_crop = hidden.sum(-1, keepdim=True).clamp(min=1)  # (G, B, 1)
    return CropBatch(
        global_crops=_stack([view.global_crops for view in views]),
        local_crops=_stack([view.local_crops for view in views]),
        gram_crops=_stack([view.gram_crops for view in views]),
        masks=hidden,
        mask_indices=hidden.flatten().nonzero().flatten(),
        mask_weights=(1.0 / per_crop.float()).expand_as(hidden)[hidden],
        indices=torch.from_numpy(np.asarray(indices, dtype=np.int64)),
        names=tuple(names),
        skipped=tuple(skipped),
    )


def _stack(crops: list[list[Tensor]]) -> Tensor | None:
    """(C, B, 3, Y, X) contiguous from B lists of C crops (3, Y, X) of any strides; None for C = 0."""
    if not crops[0]:
        return None
    stacked = torch.empty((len(crops[0]), len(crops), *crops[0][0].shape), dtype=torch.uint8)
    for image, row in enumerate(crops):
        for crop, pixels in enumerate(row):
            stacked[crop, image] = pixels
    return stacked


def normalize(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(crops / 255 - mean) / std, per channel, in fp32 on the crops' own device.

    crops: uint8 (..., 3, Y, X); mean, std: 3 numbers in [0, 1] units. Result: fp32 (..., 3, Y, X).
    """
    if crops.dtype != torch.uint8 or crops.ndim < 3 or crops.shape[-3] != 3:
        raise ValueError(f"normalize: crops must be uint8 (..., 3, Y, X), got {crops.dtype} {tuple(crops.shape)}")
    channels = torch.tensor([tuple(mean), tuple(std)], dtype=torch.float32) * 255.0  # (2, 3)
    shift, scale = channels.to(crops.device).reshape(2, 3, 1, 1)
    return crops.to(torch.float32).sub_(shift).div_(scale)


def resized(crops: Tensor, side: int) -> Tensor:
    """Normalised crops fp32 (G, B, 3, Y, X) at another side, bicubic with antialiasing; as they are at their own."""
    if crops.shape[-2:] == (side, side):
        return crops
    smaller = F.interpolate(crops.flatten(0, 1), size=(side, side), mode="bicubic", antialias=True)
    return smaller.unflatten(0, crops.shape[:2])


def patch_grid(side: int, patch_size: int, name: str) -> int:
    """Patches along a side of `side` pixels; a side that is no multiple of `patch_size` is an error."""
    if side > 0 and side % patch_size == 0:
        return side // patch_size
    below = side // patch_size * patch_size
    nearest = " or ".join(str(size) for size in (below, below + patch_size) if size > 0)
    raise ValueError(f"{name}: expected a multiple of the patch size {patch_size} (nearest: {nearest}), got {side}")
