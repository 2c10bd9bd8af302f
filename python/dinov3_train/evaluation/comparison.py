"""The same photographs through several backbones or checkpoints, side by side: components, cosines, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from dinov3_train.evaluation.attention import prefix_attention
from dinov3_train.evaluation.maps import PatchMap, cosine_map, patch_at, patch_maps, pca_colors
from dinov3_train.evaluation.pictures import Strip, colored, cosine_floor, enlarged, ringed
from dinov3_train.evaluation.view import View, to_pixels

KINDS = ("pca", "cosine", "attention")


@dataclass(frozen=True)
class Column:
    """One backbone's maps of all photographs, in their order; attention: pictures of its CLS token, or None."""

    heading: str
    maps: tuple[PatchMap, ...]
    attention: tuple[Image.Image, ...] | None = None


def column(heading: str, backbone: nn.Module, images: Sequence[tuple[str, Image.Image]], view: View) -> Column:
    """Run the photographs through one backbone; attention is left out where it has none."""
    maps = patch_maps(backbone, images, view)
    attends = all(hasattr(block, "attn") for block in getattr(backbone, "blocks", [None]))
    pictures = [attention_pictures(backbone, entry, view)[0] for entry in maps] if attends else None
    return Column(heading, tuple(maps), None if pictures is None else tuple(pictures))


def attention_pictures(backbone: nn.Module, entry: PatchMap, view: View, *, block: int = -1) -> list[Image.Image]:
    """Attention of CLS, then of each register, to the patches of one photograph, mean over heads.

    Bright is the picture's 99th percentile and above: one patch that takes it all would hide the rest.
    """
    device = next(backbone.parameters()).device
    images = view.normalized(to_pixels(entry.image).to(device))[None]
    shares = prefix_attention(backbone, images, block=block)[0].mean(dim=1)  # (1 + R, h, w)
    high = shares.flatten(1).quantile(0.99, dim=1)[:, None, None].clamp_min(1e-12)
    return [enlarged(colored(part.numpy()), entry.image.size, False) for part in shares / high]


def shared_colors(columns: Sequence[Column]) -> list[list[np.ndarray]]:
    """Component colours of each column's photographs: one basis for all columns where their features have one width.

    Otherwise each column has a basis of its own.
    """
    widths = {entry.features.shape[-1] for one in columns for entry in one.maps}
    if len(widths) > 1:
        return [pca_colors([entry.features for entry in one.maps]) for one in columns]
    everything = pca_colors([entry.features for one in columns for entry in one.maps])
    count = len(columns[0].maps)
    return [everything[start : start + count] for start in range(0, len(everything), count)]


def cosine_picture(entry: PatchMap, point: tuple[float, float]) -> tuple[Image.Image, float]:
    """The similarity of the patch at a point (x, y shares) to all others, ringed, and the low end of its scale."""
    cosine = cosine_map(entry.features, patch_at(entry.grid, point))
    low = cosine_floor([cosine])
    shares = (cosine.numpy() - low) / max(1 - low, 1e-6)
    return ringed(enlarged(colored(shares), entry.image.size, False), centre(entry, point)), low


def centre(entry: PatchMap, point: tuple[float, float]) -> tuple[float, float]:
    """Centre, in pixels, of the patch under a point."""
    (row, place), (height, width) = patch_at(entry.grid, point), entry.grid
    return (place + 0.5) * entry.image.width / width, (row + 0.5) * entry.image.height / height


def strips(columns: Sequence[Column], *, kind: str, point: tuple[float, float] = (0.5, 0.5)) -> list[Strip]:
    """Each photograph beside one picture per column, to be put on a sheet.

    Args:
        columns: at least one, of the same photographs.
        kind: "pca", "cosine" (of the patch at `point`) or "attention" (of CLS).

    Errors: ValueError for another kind, no columns, or attention of a backbone that has none.
    """
    if kind not in KINDS or not columns:
        raise ValueError(f"strips: expected a kind of {', '.join(KINDS)} and columns, got {kind!r} and {len(columns)}")
    if kind == "attention" and any(one.attention is None for one in columns):
        without = [one.heading for one in columns if one.attention is None]
        raise ValueError(f"attention: expected backbones with attention blocks, got none in {', '.join(without)}")
    colors = shared_colors(columns) if kind == "pca" else []
    found = []
    for number, entry in enumerate(columns[0].maps):
        photograph = ringed(entry.image, centre(entry, point)) if kind == "cosine" else entry.image
        tiles, headings = [photograph], ["photograph"]
        for place, one in enumerate(columns):
            size, heading = one.maps[number].image.size, one.heading
            if kind == "pca":
                tiles.append(enlarged(colors[place][number], size, False))
            elif kind == "cosine":
                picture, low = cosine_picture(one.maps[number], point)
                tiles.append(picture)
                heading = f"{heading}, {low:.2f} to 1"
            else:
                tiles.append(one.attention[number])
            headings.append(heading)
        found.append(Strip(entry.name, tuple(tiles), tuple(headings)))
    return found


@torch.no_grad()
def attention_strips(
    backbone: nn.Module, images: Sequence[tuple[str, Image.Image]], view: View, *, block: int = -1
) -> list[Strip]:
    """Each photograph beside the attention of CLS and of each register in one block."""
    found = []
    for entry in patch_maps(backbone, images, view):
        pictures = attention_pictures(backbone, entry, view, block=block)
        names = ["photograph", "CLS", *(f"register {number + 1}" for number in range(len(pictures) - 1))]
        found.append(Strip(entry.name, (entry.image, *pictures), tuple(names)))
    return found
