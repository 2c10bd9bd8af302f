"""How an image becomes the tensor that is evaluated: sides, crop, normalisation; kept with each number made from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3_train.counter import uniform
from dinov3_train.data.augmentation import DRAWS, FLIP, crop_box
from dinov3_train.data.batch import normalize

RESIZES = ("short_side_center_crop", "squash")


@dataclass(frozen=True, kw_only=True)
class View:
    """A square view of `size` pixels.

    size: side in pixels, a multiple of the backbone's patch size.
    short_side: side to which the short side is resized before the centre crop, in pixels; None: `size`, so that the
        whole short side is seen. `View(size=224, short_side=256)` is the protocol of the DINO papers.
    resize: "short_side_center_crop", or "squash" (both sides to `size`; the aspect is lost, nothing is cut off).
    mean, std: per channel, of pixels in [0, 1].

    Resizing is bicubic with antialiasing.
    Errors: ValueError for a size below 1, a short side below the size, an unknown resize.
    """

    size: int
    short_side: int | None = None
    resize: str = "short_side_center_crop"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"View: size is a side in pixels, expected at least 1, got {self.size}")
        if self.resize not in RESIZES:
            raise ValueError(f"View: resize expects one of {', '.join(RESIZES)}, got {self.resize!r}")
        if self.short_side is not None and self.short_side < self.size:
            raise ValueError(f"View: short_side expects at least size ({self.size}), got {self.short_side}")

    def to_dict(self) -> dict:
        """The settings as JSON keeps them (lists for tuples), so that stored and fresh ones compare equal."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def pixels(self, image: Image.Image) -> Tensor:
        """uint8 (3, size, size) of one RGB image."""
        if self.resize == "squash":
            return to_pixels(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        target = self.short_side or self.size
        width, height = image.size
        scale = target / min(width, height)
        sides = (max(target, round(width * scale)), max(target, round(height * scale)))
        left, top = (sides[0] - self.size) // 2, (sides[1] - self.size) // 2
        resized = image if sides == image.size else image.resize(sides, Image.Resampling.BICUBIC)
        return to_pixels(resized.crop((left, top, left + self.size, top + self.size)))

    def pixels_of(self, image: Image.Image, number: int) -> Tensor:
        """The same; a view may depend on the number that the image has in its source."""
        return self.pixels(image)

    def seen(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom): the part of an image of these sides, in its own pixels, that the view shows."""
        if self.resize == "squash":
            return 0, 0, width, height
        side = min(width, height) * self.size / (self.short_side or self.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return left, top, min(width, left + round(side)), min(height, top + round(side))

    def rectangle(self, image: Image.Image, multiple: int) -> Image.Image:
        """The whole image, native aspect: short side `size`, both sides rounded to multiples of `multiple` pixels."""
        scale = self.size / min(image.size)
        sides = tuple(max(multiple, round(side * scale / multiple) * multiple) for side in image.size)
        return image if sides == image.size else image.resize(sides, Image.Resampling.BICUBIC)

    def normalized(self, pixels: Tensor) -> Tensor:
        """fp32 of uint8 (..., 3, Y, X), on the same device: (pixels / 255 - mean) / std."""
        return normalize(pixels, self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class AugmentedView(View):
    """A random crop of the area `scale`, resized to `size`, mirrored half of the time; a function of (seed, epoch,
    number of the image). It is what linear probes train on in the papers.

    scale: shares of the image's area, low and high, in (0, 1].
    """

    seed: int = 0
    epoch: int = 0
    scale: tuple[float, float] = (0.08, 1.0)

    def pixels_of(self, image: Image.Image, number: int) -> Tensor:
        """uint8 (3, size, size) of the RGB image `number`."""
        draws = uniform(self.seed, f"evaluation/view/{self.epoch}", number, DRAWS)
        left, top, width, height = crop_box(draws, image.width, image.height, self.scale)
        cut = image.crop((left, top, left + width, top + height)).resize((self.size,) * 2, Image.Resampling.BICUBIC)
        return to_pixels(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[FLIP] < 0.5 else cut)


def to_pixels(image: Image.Image) -> Tensor:
    """uint8 (3, Y, X) of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
