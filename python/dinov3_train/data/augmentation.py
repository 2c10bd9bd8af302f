"""Multi-crop augmentation: the crops of one image, as a pure function of (image, seed).

Crops, resizes and colours are those of torchvision v2 on PIL images (RandomResizedCrop, ColorJitter, RandomGrayscale,
GaussianBlur, RandomSolarize) with the same distributions, and the same bits for the same parameters (blur: one level).
The draws come from `counter` and not from torch's global state, so that nothing needs to be forked and restored, and
the operators are composed by hand: twice the images per CPU second of the v2 classes (2 x 64 + 6 x 32 px from 128 px
JPEGs: 157 and 356; 2 x 224 + 8 x 96 px: 45 and 93).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from .. import counter
from ..config import Crops
from .batch import Views

# probabilities of the first global crop, further global crops, local crops
BLUR = {"paper": (1.0, 0.1, 0.5), "released": (0.0, 0.9, 0.5), "none": (0.0, 0.0, 0.0)}
BLUR_RADIUS = 4  # kernel 9
BLUR_SIGMA = (0.1, 2.0)
RATIO = (3 / 4, 4 / 3)  # width over height of a crop, log-uniform
ATTEMPTS = 10  # boxes tried before the central crop
KEPT_DETAIL = 2.0  # a large image is shrunk first only as far as each crop still has twice the pixels it needs
ORDERS = list(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue

# columns of a crop's draws
BOX = slice(0, 2 * ATTEMPTS)
PLACE = slice(20, 22)
FLIP, JITTER, ORDER = 22, 23, 24
FACTORS = slice(25, 29)
GRAY, BLURRED, SIGMA, SOLARIZED, DRAWS = 29, 30, 31, 32, 33


class MultiCrop:
    """Global, local and Gram crops of an image.

    crops: sides, scales and probabilities. With a Gram side the box is cut once, at that side: the Gram crop keeps its
    colours, the global crop is resized from it and then coloured.
    """

    def __init__(self, crops: Crops) -> None:
        if crops.blur not in BLUR:
            raise ValueError(f"crops.blur: expected one of {', '.join(BLUR)}, got {crops.blur!r}")
        if crops.globals < 1 or crops.locals < 0:
            raise ValueError(f"crops: expected globals >= 1 and locals >= 0, got {crops.globals} and {crops.locals}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(crops, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"crops.{name}: expected 0 < low <= high <= 1, got {low}, {high}")
        self.crops = crops

    def __call__(self, image: Image.Image, seed: int) -> Views:
        """All crops of an RGB image, uint8 (3, side, side) each; `seed` decides every draw."""
        crops = self.crops
        draws = counter.uniform(seed, "augmentation", np.arange(crops.globals + crops.locals), DRAWS)
        global_crops, gram_crops = [], []
        for number in range(crops.globals):
            cut = self._cut(image, draws[number], crops.global_scale, crops.gram_size or crops.global_size)
            if crops.gram_size is not None:
                gram_crops.append(to_tensor(np.array(cut)))
                cut = cut.resize((crops.global_size, crops.global_size), Image.Resampling.BICUBIC)
            global_crops.append(self._color(cut, draws[number], number))
        local_crops = []
        for row in draws[crops.globals :]:
            cut = self._cut(image, row, crops.local_scale, crops.local_size)
            local_crops.append(self._color(cut, row, None))
        return Views(global_crops, local_crops, gram_crops)

    def reduction(self, width: int, height: int) -> int:
        """Whole number by which an image of this size may be shrunk: each crop keeps `KEPT_DETAIL` times its side."""
        crops = self.crops
        kinds = [(crops.global_scale[0], crops.gram_size or crops.global_size)]
        kinds += [(crops.local_scale[0], crops.local_size)] if crops.locals else []
        spare = [math.sqrt(scale * RATIO[0] * width * height) / (KEPT_DETAIL * side) for scale, side in kinds]
        return max(1, math.floor(min(spare)))

    def _cut(self, image: Image.Image, draws: np.ndarray, scale: tuple[float, float], side: int) -> Image.Image:
        left, top, width, height = crop_box(draws, image.width, image.height, scale)
        cut = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
        mirrored = draws[FLIP] < self.crops.horizontal_flip
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else cut

    def _color(self, image: Image.Image, draws: np.ndarray, number: int | None) -> Tensor:
        """Jitter, grey, blur; solarize on global crops after the first. number: of the global crop, None: local.

        Result: uint8 (3, side, side).
        """
        crops = self.crops
        if draws[JITTER] < crops.color_jitter_probability:
            image = color_jitter(image, draws[FACTORS], crops.color_jitter, ORDERS[int(draws[ORDER] * len(ORDERS))])
        if draws[GRAY] < crops.grayscale:
            image = image.convert("L").convert("RGB")
        pixels = np.array(image)  # (Y, X, 3)
        if draws[BLURRED] < BLUR[crops.blur][2 if number is None else min(number, 1)]:
            pixels = gaussian_blur(pixels, BLUR_SIGMA[0] + draws[SIGMA] * (BLUR_SIGMA[1] - BLUR_SIGMA[0]))
        if number is not None and number > 0 and draws[SOLARIZED] < crops.solarize:
            pixels = solarize(pixels)
        return to_tensor(pixels)


def crop_box(draws: np.ndarray, width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, width, height of a random box: area U(scale) of the image, aspect log-uniform in [3/4, 4/3].

    The first of ten proposals that fits; else the largest central box of an allowed aspect.
    draws: (33,), see BOX and PLACE.
    """
    for area, aspect in draws[BOX].reshape(ATTEMPTS, 2):
        target = width * height * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(math.log(RATIO[0]) + aspect * (math.log(RATIO[1]) - math.log(RATIO[0])))
        columns, rows = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            top, left = draws[PLACE] * (height - rows + 1, width - columns + 1)
            return int(left), int(top), columns, rows
    columns = min(width, max(1, round(height * RATIO[1])))
    rows = min(height, max(1, round(width / RATIO[0])))
    return (width - columns) // 2, (height - rows) // 2, columns, rows


def color_jitter(
    image: Image.Image, draws: np.ndarray, strength: tuple[float, float, float, float], order: tuple[int, ...]
) -> Image.Image:
    """Brightness, contrast, saturation and hue in the given order.

    draws: (4,) in [0, 1); strength: factors U(max(0, 1 - s), 1 + s), hue shift U(-s, s) of the circle.
    """
    for operation in order:
        amount, draw = strength[operation], draws[operation]
        if amount == 0:
            continue
        low = max(0.0, 1 - amount)
        factor = (2 * draw - 1) * amount if operation == 3 else low + draw * (1 + amount - low)
        image = COLORS[operation](image, factor)
    return image


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """factor * image, clipped."""
    return Image.blend(Image.new("RGB", image.size), image, factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """The image's distance from its mean grey, times `factor`. (ImageEnhance finds the mean in Python, 3x slower.)"""
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Each pixel's distance from its own grey, times `factor`."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def hue(image: Image.Image, shift: float) -> Image.Image:
    """Hue turned by `shift` of the circle, -0.5 to 0.5, in 8-bit HSV, modulo 256."""
    step = int(shift * 255) % 256  # towards zero first, as torchvision
    pixels = image.convert("HSV")
    return ImageChops.add_modulo(pixels, Image.new("HSV", image.size, (step, 0, 0))).convert("RGB")


COLORS = (brightness, contrast, saturation, hue)


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of 9 taps per axis, weights exp(-x^2 / (2 sigma^2)) of sum 1, borders reflected.

    Two passes of 9 taps in place of torchvision's 81: fp32, rounded once. pixels, result: uint8 (Y, X, 3).
    """
    height, width, radius = *pixels.shape[:2], BLUR_RADIUS
    if min(height, width) <= radius:
        raise ValueError(f"gaussian_blur: expected sides above {radius} pixels, got {width} x {height}")
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    taps = (taps / (2 * taps.sum() - taps[0])).astype(np.float32)  # centre, then one side
    rows = pixels[_reflected(height)]  # (Y + 8, X, 3)
    padded = np.empty((height, width + 2 * radius, 3), dtype=np.float32)
    _weigh(rows.astype(np.float32), taps, 0, out=padded[:, radius:-radius])
    padded[:, :radius] = padded[:, 2 * radius : radius : -1]
    padded[:, -radius:] = padded[:, -radius - 2 : -2 * radius - 2 : -1]
    blurred = _weigh(padded, taps, 1, out=np.empty(pixels.shape, dtype=np.float32))
    blurred += 0.5
    return blurred.astype(np.uint8)


def _reflected(length: int) -> np.ndarray:
    """Row numbers from -radius to length + radius - 1, mirrored at the first and the last row."""
    places = np.abs(np.arange(-BLUR_RADIUS, length + BLUR_RADIUS))
    return length - 1 - np.abs(length - 1 - places)


def _weigh(padded: np.ndarray, taps: np.ndarray, axis: int, *, out: np.ndarray) -> np.ndarray:
    """out = sum_k taps[|k|] * padded shifted by k along `axis`, fp32; `padded` has the radius more at both ends."""
    length = out.shape[axis]

    def shifted(offset: int) -> np.ndarray:
        window = slice(BLUR_RADIUS + offset, BLUR_RADIUS + offset + length)
        return padded[window] if axis == 0 else padded[:, window]

    np.multiply(shifted(0), taps[0], out=out)
    pair = np.empty(out.shape, dtype=np.float32)
    for distance in range(1, BLUR_RADIUS + 1):
        np.add(shifted(-distance), shifted(distance), out=pair)
        pair *= taps[distance]
        out += pair
    return out


def solarize(pixels: np.ndarray) -> np.ndarray:
    """Values of 128 and more inverted. pixels, result: uint8 (Y, X, 3)."""
    return np.where(pixels < 128, pixels, 255 - pixels)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (3, Y, X), a view of pixels (Y, X, 3): `collate` brings them into order in its one copy."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
