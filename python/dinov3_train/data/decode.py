"""From the bytes of an image file to an upright 8-bit RGB picture, or a named reason why not."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACKDROP = (255, 255, 255)  # behind transparent pixels: white, as a page shows them
ORIENTATION = 0x0112  # EXIF tag


class UnreadableImage(Exception):
    """An image that cannot be decoded: `name: reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(
    data: bytes | Image.Image, name: str = "image", *, reduction: Callable[[int, int], int] | None = None
) -> Image.Image:
    """An upright RGB image, 8 bits per channel; of an animation the first frame.

    data: a file's bytes, or an image (of a torchvision dataset); name: for errors; reduction: (width, height) -> the
    whole number by which a large image may be shrunk before anything else (JPEG then decodes fewer coefficients).
    16-bit grey is scaled, round(v * 255 / 65535); of 16-bit RGB Pillow keeps the high byte; transparent pixels lie on
    white; CMYK and palettes become RGB; colour profiles are ignored. Errors: UnreadableImage.
    """
    try:
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        if reduction is not None and image.format == "JPEG":
            factor = reduction(*image.size)
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        picture = _rgb(_upright(image))
        factor = reduction(*picture.size) if reduction is not None else 1
        return picture.reduce(factor) if factor > 1 else picture
    except Exception as error:  # Pillow's readers raise a dozen unrelated types on damaged files
        reason = " ".join(f"{error}".replace(repr(data) if isinstance(data, Image.Image) else "\0", "").split())
        raise UnreadableImage(name, _reason(data, reason or type(error).__name__)) from error


def _reason(data: bytes | Image.Image, reason: str) -> str:
    if isinstance(data, bytes) and not data:
        return "the file is empty"
    return "not an image of a known kind" if reason.startswith("cannot identify image file") else reason


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; damaged EXIF says nothing."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # the pixels are fine, and viewers show such a file as it is stored
        return image
    method = UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; expected 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        picture = image.convert("RGBA")
        below = Image.new("RGB", picture.size, BACKDROP)
        below.paste(picture, mask=picture.getchannel("A"))
        return below
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to RGB: round(v * 255 / 65535). Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)  # (Y, X)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f"integer pixels from {values.min()} to {values.max()}; expected 16 bits, 0 to 65535")
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
