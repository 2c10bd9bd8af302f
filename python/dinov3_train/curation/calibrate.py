"""The similarity from which two images are near duplicates, measured with the backbone and the images at hand."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.decode import UnreadableImage, decode
from ..evaluation.view import View
from .embed import EmbedSettings, Pool, features
from .kmeans import draw_rows
from .nearest import fp32_products

IMAGES = 200  # re-encoded
QUALITY = 50  # of JPEG
SCALE = 0.9  # of both sides, before encoding
FOUND = 0.97  # share of the re-encoded images that the threshold finds again
HIGHEST = 0.99999  # rounding of fp16 rows must not part equal images


@dataclass(frozen=True)
class Calibrated:
    """threshold: cosine; others: share of the images looked at that another one of them reaches; images: how many."""

    threshold: float
    others: float
    images: int


def calibrate(backbone: nn.Module, images: Pool, view: View, *, settings: EmbedSettings, seed: int = 0) -> Calibrated:
    """Re-encode some images and take the similarity that 97 % of them keep to themselves.

    Each of up to 200 images of the pool, drawn by the seed, is scaled to 0.9 of its sides and stored as a JPEG of
    quality 50, and both are embedded. A similarity means little across backbones (an untrained one gives .99 to
    everything), this share means the same for all.
    Errors: ValueError when none of the images drawn can be read.
    """
    rows = draw_rows(seed, "calibrate", min(IMAGES, len(images)), len(images))
    pictures = [picture for picture in (_picture(images, int(row)) for row in rows) if picture is not None]
    if not pictures:
        raise ValueError(f"dedup: none of {len(rows)} images drawn to find a threshold can be read")
    first, second = (
        _embedded(backbone, found, view, settings) for found in (pictures, [re_encoded(p) for p in pictures])
    )
    kept = (first * second).sum(dim=1).numpy()
    threshold = min(HIGHEST, float(np.quantile(kept, 1.0 - FOUND)))
    with fp32_products():
        among = first @ first.T
    among.fill_diagonal_(-1.0)
    others = float((among.amax(dim=1) >= threshold).float().mean())
    return Calibrated(threshold, others, len(pictures))


def re_encoded(picture: Image.Image) -> Image.Image:
    """The picture at 0.9 of its sides, as a JPEG of quality 50 brings it back."""
    sides = tuple(max(1, round(SCALE * side)) for side in picture.size)
    stored = io.BytesIO()
    picture.resize(sides, Image.Resampling.BICUBIC).save(stored, "JPEG", quality=QUALITY)
    return decode(stored.getvalue())


def _picture(images: Pool, number: int) -> Image.Image | None:
    place, index = images.find(number)
    try:
        return decode(images.sources[place].read(index), images.sources[place].name(index))
    except (UnreadableImage, OSError):  # counted and named by the stage that embeds
        return None


def _embedded(backbone: nn.Module, pictures: list[Image.Image], view: View, settings: EmbedSettings) -> Tensor:
    parts = [
        features(
            backbone,
            torch.stack([view.pixels(p) for p in pictures[start : start + settings.batch_size]]),
            view,
            settings,
        )
        for start in range(0, len(pictures), settings.batch_size)
    ]
    return nn.functional.normalize(torch.cat(parts), dim=1).half().float()
