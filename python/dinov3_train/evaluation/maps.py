"""Maps of patch features: principal components as colours, cosine similarity to a chosen patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3_train.evaluation.view import View, to_pixels


@dataclass(frozen=True)
class PatchMap:
    """One photograph as the backbone saw it.

    image: RGB, (h * patch size) x (w * patch size) pixels; features: (h, w, D), fp32, CPU, normed patch tokens.
    """

    name: str
    image: Image.Image
    features: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches."""
        return tuple(self.features.shape[:2])


@torch.no_grad()
def patch_maps(backbone: nn.Module, images: Sequence[tuple[str, Image.Image]], view: View) -> list[PatchMap]:
    """Patch features of whole photographs at their native aspect, one forward pass each.

    Args:
        backbone: has `features` and `patch_size`; on any device; its train or eval mode is as before afterwards.
        images: (name, RGB image) pairs.
        view: its `size` is the short side in pixels; sides are rounded to multiples of the patch size.
    """
    was_training, device = backbone.training, next(backbone.parameters()).device
    backbone.eval()
    maps = []
    try:
        for name, image in images:
            shown = view.rectangle(image, backbone.patch_size)
            features = backbone.features(view.normalized(to_pixels(shown).to(device))[None])
            maps.append(PatchMap(name, shown, features.patches[0].float().cpu().unflatten(0, tuple(features.grid))))
    finally:
        backbone.train(was_training)
    return maps


def pca_colors(maps: Sequence[Tensor], *, percentile: float = 1.0) -> list[np.ndarray]:
    """The first three principal components of all maps together as red, green and blue.

    One basis serves all maps, so equal colours mean similar features across images. Each component is cut at
    `percentile` and 100 - `percentile` over all patches and scaled to [0, 255]; its sign makes the loading of largest
    magnitude positive, so that colours do not flip from run to run.

    Args:
        maps: (h, w, D) each, one D.
        percentile: share in percent cut off at both ends, in [0, 50).

    Returns uint8 (h, w, 3) each; a component without variance is mid-grey.
    Errors: ValueError for no maps, differing widths, non-finite features, a percentile outside [0, 50).
    """
    widths = {features.shape[-1] for features in maps}
    if len(widths) != 1:
        raise ValueError(f"pca_colors: maps expect at least one (h, w, D) of one D, got widths {sorted(widths)}")
    if not 0 <= percentile < 50:
        raise ValueError(f"pca_colors: percentile expects a number in [0, 50), got {percentile}")
    rows = torch.cat([features.reshape(-1, features.shape[-1]) for features in maps]).double()  # (n, D)
    if not torch.isfinite(rows).all():
        raise ValueError("pca_colors: features expect finite numbers, got NaN or infinity")
    colors = _scaled(_principal(rows).numpy(), percentile)  # (n, 3)
    counts = [features.shape[0] * features.shape[1] for features in maps]
    parts = np.split(colors, np.cumsum(counts)[:-1])
    return [part.reshape(*features.shape[:2], 3) for part, features in zip(parts, maps)]


def cosine_map(features: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cosine similarity of one patch to all: (h, w), fp32, in [-1, 1].

    Args:
        features: (h, w, D).
        patch: (row, column) in the grid.

    Errors: ValueError for a patch outside the grid.
    """
    height, width = features.shape[:2]
    row, column = patch
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"cosine_map: patch expects a row in [0, {height}) and a column in [0, {width}), got {patch}")
    unit = F.normalize(features.float(), dim=2)
    return (unit @ unit[row, column]).clamp(-1, 1)


def patch_at(grid: tuple[int, int], point: tuple[float, float]) -> tuple[int, int]:
    """(row, column) of the patch under a point (x, y), shares of width and height in [0, 1], origin at the top left."""
    if not all(0 <= share <= 1 for share in point):
        raise ValueError(f"patch_at: point expects x and y as shares in [0, 1], got {point}")
    return min(int(point[1] * grid[0]), grid[0] - 1), min(int(point[0] * grid[1]), grid[1] - 1)


def _principal(rows: Tensor) -> Tensor:
    """Projections (n, 3) of rows (n, D) on their principal axes, largest variance first; missing axes are zero."""
    centred = rows - rows.mean(dim=0)
    values, axes = torch.linalg.eigh(centred.T @ centred / len(rows))  # ascending
    axes = axes[:, values > values[-1].clamp_min(1e-300) * 1e-12].flip(1)[:, :3]  # (D, up to 3)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)) if axes.shape[1] else axes[:1]
    return F.pad(centred @ (axes * largest.sign()), (0, 3 - axes.shape[1]))


def _scaled(components: np.ndarray, percentile: float) -> np.ndarray:
    low, high = np.percentile(components, [percentile, 100 - percentile], axis=0)  # (3,) each
    span = high - low
    shares = np.where(span > 0, (components - low) / np.where(span > 0, span, 1), 0.5)
    return (shares.clip(0, 1) * 255).round().astype(np.uint8)
