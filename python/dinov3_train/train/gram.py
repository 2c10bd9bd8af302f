"""The Gram teacher: a frozen backbone, or the live EMA, whose patch similarities the student keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import CropBatch, normalize


@dataclass
class GramTeacher:
    """What gives the Gram term its targets.

    backbone: evaluation mode, no gradient, has `features`; the EMA teacher's own backbone where the live EMA serves.
    mean, std: normalisation its weights were trained with; crops: it sees the first so many global crops, None: all.
    """

    backbone: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crops: int | None = None

    @torch.no_grad()
    def patches(self, batch: CropBatch, patch_size: int) -> Tensor:
        """Patch tokens of the Gram crops (the global crops where there are none) on the student's grid: (G', B, N, D).

        Features, not images, are resized, and similarities are taken afterwards.
        patch_size: the student's, in pixels.
        """
        seen = batch.global_crops if batch.gram_crops is None else batch.gram_crops  # (G, B, 3, Y', X')
        features = self.backbone.features(normalize(seen[: self.crops].flatten(0, 1), self.mean, self.std))
        height, width = (side // patch_size for side in batch.global_crops.shape[-2:])
        return resized(features.patches, features.grid, (height, width)).unflatten(0, (-1, seen.shape[1]))

    @torch.no_grad()
    def refresh(self, backbone: nn.Module) -> None:
        """Copy the EMA teacher's weights, as they are now."""
        for mine, theirs in zip(self.backbone.parameters(), backbone.parameters(), strict=True):
            mine.copy_(theirs)


def resized(patches: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patch features (S, N, D) of `grid` as (S, N', D) of grid `to`, fp32: bicubic, not antialiased.

    Source: spec 3.6, trap 6.
    """
    patches = patches.float()
    if grid == to:
        return patches
    with torch.autocast(patches.device.type, enabled=False):
        maps = patches.transpose(1, 2).unflatten(2, grid)  # (S, D, h, w)
        maps = F.interpolate(maps, size=to, mode="bicubic", align_corners=False, antialias=False)
    return maps.flatten(2).transpose(1, 2)
