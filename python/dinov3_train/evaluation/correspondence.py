"""Dense quality without labels: is a patch found again in another view of its image?

Two views of one image under a known crop, flip and colour change; a patch of the second is matched to the most similar
patch of the first. Features that hold no place (all patches alike, or noise) fail, and so do features that hold nothing
but colour: untrained backbones, whose patch similarities look local, score low here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3_train import counter
from dinov3_train.data.augmentation import color_jitter, gaussian_blur
from dinov3_train.evaluation.panel import BATCH, Panel
from dinov3_train.evaluation.view import to_pixels

SCALE = (0.6, 0.9)  # side of the second view's box over the side of the first view
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
BLUR_SIGMA = 1.0  # pixels, of half of the images


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """First and second view of n images: uint8 (n, 3, Y, Y) each.

    boxes: (n, 3) left, top and side of the second view's box as shares of the first view's side; mirrored: bool (n,).
    """

    panel: Panel
    second: Tensor
    boxes: np.ndarray
    mirrored: np.ndarray


def make_pairs(panel: Panel, *, seed: int = 0) -> Pairs:
    """The second view of every image of a panel, cut from its finer pixels, as `seed` and its place decide."""
    draws = counter.uniform(seed, "correspondence", np.arange(len(panel.names)), 9)
    side = SCALE[0] + draws[:, 0] * (SCALE[1] - SCALE[0])
    boxes = np.stack([draws[:, 1] * (1 - side), draws[:, 2] * (1 - side), side], axis=1)
    mirrored = draws[:, 3] < 0.5
    size, second = panel.view.size, []
    for number, pixels in enumerate(panel.finer):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        left, top, share = boxes[number] * image.width
        cut = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + share, top + share))
        if mirrored[number]:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        cut = color_jitter(cut, draws[number, 4:8], JITTER, (0, 1, 2, 3))
        if draws[number, 8] < 0.5:
            cut = Image.fromarray(gaussian_blur(np.array(cut), BLUR_SIGMA))
        second.append(to_pixels(cut))
    return Pairs(panel=panel, second=torch.stack(second), boxes=boxes, mirrored=mirrored)


@torch.no_grad()
def pair_features(backbone: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Normed patch features of both views, fp32 on the CPU: (n, h, w, D) each."""
    device, found = next(backbone.parameters()).device, []
    for views in (pairs.panel.pixels, pairs.second):
        parts = []
        for pixels in views.split(BATCH):
            features = backbone.features(pairs.panel.view.normalized(pixels.to(device)))
            parts.append(features.patches.float().cpu().unflatten(1, tuple(features.grid)))
        found.append(torch.cat(parts))
    return found[0], found[1]


def correspondence(first: Tensor, second: Tensor, pairs: Pairs) -> Tensor:
    """Share of the second view's patches whose most similar patch of the first view is the right one: (n,) in [0, 1].

    Right: their centres are at most one patch apart, in the first view. Chance is about pi / (h w).

    Args:
        first, second: (n, h, w, D) patch features of the two views.
        pairs: what relates the views.
    """
    height, width = first.shape[1:3]
    unit = [F.normalize(each.float().flatten(1, 2), dim=-1) for each in (first, second)]  # (n, N, D)
    matched = torch.einsum("nid,njd->nij", unit[1], unit[0]).argmax(dim=2)  # (n, N)
    found = torch.stack([matched % width, matched // width], dim=2) + 0.5  # (n, N, 2) in patches
    return ((found - true_places(pairs, (height, width))).norm(dim=2) <= 1.0).float().mean(dim=1)


def true_places(pairs: Pairs, grid: tuple[int, int]) -> Tensor:
    """Where the centres of the second view's patches lie in the first view, x and y in patches: fp32 (n, N, 2)."""
    height, width = grid
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    x = np.where(pairs.mirrored[:, None, None], 1 - x, x)  # (n, h, w) of the box
    y = np.broadcast_to(y, x.shape)
    left, top, side = pairs.boxes.T[:, :, None, None]
    places = np.stack([(left + x * side) * width, (top + y * side) * height], axis=3)  # (n, h, w, 2)
    return torch.from_numpy(places.reshape(len(places), -1, 2)).float()
