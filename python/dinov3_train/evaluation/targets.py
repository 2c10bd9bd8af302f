"""What is known of each pixel: class masks and depth maps that lie beside the images."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3_train.data.decode import ORIENTATION, UnreadableImage
from dinov3_train.evaluation.reading import Companion, companion
from dinov3_train.evaluation.view import View

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source

VOID = 255  # class of pixels that count nowhere
MASKS = ("mask.png",)
DEPTHS = ("depth.png", "depth.npy")
MILLIMETRES = 1000.0
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Target(Protocol):
    """How one kind of pixel target is read: its files, what they hold, and what is wrong with one."""

    suffixes: tuple[str, ...]

    def read(self, beside: Companion, name: str) -> Tensor:
        """(Y, X) of the whole image."""


@dataclass(frozen=True)
class MaskTarget:
    """Class masks: `NAME.mask.png`, one channel of class indices (palette images by index), 255 = void."""

    suffixes: tuple[str, ...] = MASKS

    def read(self, beside: Companion, name: str) -> Tensor:
        """int64 (Y, X). Errors: ValueError naming the image whose mask cannot be read or has several channels."""
        try:
            mask = Image.open(io.BytesIO(beside[1]))
            mask.load()
        except Exception as error:  # Pillow's readers raise a dozen unrelated types on damaged files
            raise ValueError(f"mask of {name}: cannot be read ({' '.join(str(error).split())[:80]})") from error
        if mask.mode not in ("L", "P", "1", "I;16", "I"):
            raise ValueError(f"mask of {name}: expected one channel of class indices, got mode {mask.mode}")
        return torch.from_numpy(np.asarray(mask).astype(np.int64))


@dataclass(frozen=True)
class DepthTarget:
    """Depth in metres: `NAME.depth.png`, 16-bit millimetres, 0 = unknown; or `NAME.depth.npy`, metres (Y, X), where
    zero, negative, NaN and infinite values are unknown."""

    suffixes: tuple[str, ...] = DEPTHS

    def read(self, beside: Companion, name: str) -> Tensor:
        """fp32 (Y, X) in metres, 0 where unknown. Errors: ValueError naming the image whose depth cannot be read."""
        suffix, content = beside
        try:
            if suffix.endswith("npy"):
                values = np.load(io.BytesIO(content), allow_pickle=False)
            else:
                values = np.asarray(Image.open(io.BytesIO(content)))
        except Exception as error:  # as above
            raise ValueError(f"depth of {name}: cannot be read ({' '.join(str(error).split())[:80]})") from error
        if values.ndim != 2 or values.dtype == np.uint8:
            raise ValueError(
                f"depth of {name}: expected 16-bit millimetres (.png) or metres (.npy) of shape (Y, X), "
                f"got {values.dtype} {values.shape}"
            )
        metres = values.astype(np.float32) / (MILLIMETRES if suffix.endswith("png") else 1.0)
        return torch.from_numpy(np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0)))


def with_target(source: Source, target: Target) -> list[int]:
    """Numbers of the images that have the target's file, without decoding anything."""
    return [number for number in range(len(source)) if companion(source, number, target.suffixes) is not None]


def check_targets(
    source: Source, numbers: list[int], target: Target, look: Callable[[Tensor, str], None] = lambda values, name: None
) -> None:
    """Read every target before any work. `look(values, name)` may refuse values.

    Errors: ValueError naming the first image whose target cannot be read or has another size than the image.
    Images that cannot be read are not judged here.
    """
    for number in numbers:
        name = source.name(number)
        values = target.read(companion(source, number, target.suffixes), name)
        sides = _sides(source, number)
        if sides is not None:
            check_size(values, sides, name)
        look(values, name)


def check_size(values: Tensor, sides: tuple[int, int], name: str) -> None:
    """Errors: ValueError when a target (Y, X) has not the sides (width, height) of its image."""
    if tuple(values.shape) != sides[::-1]:
        raise ValueError(
            f"mask or depth of {name}: expected the image's size of {sides[0]} x {sides[1]} pixels, "
            f"got {values.shape[1]} x {values.shape[0]}"
        )


def _sides(source: Source, number: int) -> tuple[int, int] | None:
    """(width, height) of the upright image from its header, None where it cannot be read."""
    try:
        data = source.read(number)
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        turned = image.getexif().get(ORIENTATION) in SIDEWAYS
    except (UnreadableImage, OSError, SyntaxError, ValueError):
        return None
    return image.size[::-1] if turned else image.size


def cut(values: Tensor, view: View) -> Tensor:
    """The part of a whole image's target (Y, X) that the view shows, in the image's own pixels."""
    left, top, right, bottom = view.seen(values.shape[1], values.shape[0])
    return values[top:bottom, left:right]


def nearest(values: Tensor, sides: tuple[int, int]) -> Tensor:
    """A target (Y, X) at other sides (height, width): the value under the centre of each new pixel."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long().clamp_max(old - 1) for new, old in zip(sides, values.shape)
    )
    return values[rows[:, None], columns]
