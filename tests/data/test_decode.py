"""Images of every kind arrive upright, in 8-bit RGB, or are named."""

from __future__ import annotations

import pickle
import struct
import zlib

import numpy as np
import pytest
from pictures import encode, picture
from PIL import Image

from dinov3_train.config import Crops
from dinov3_train.data.augmentation import MultiCrop
from dinov3_train.data.decode import UPRIGHT, UnreadableImage, decode


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png(values: np.ndarray, depth: int, color: int) -> bytes:
    """A PNG written by hand: depth bits per channel, color 0 grey or 2 RGB; values (Y, X, channels)."""
    height, width = values.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations(orientation):
    upright = picture(1, 24, 16)
    inverse = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    stored = upright if orientation == 1 else upright.transpose(UPRIGHT[inverse])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF", "JPEG"):
        options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
        image = decode(encode(stored, kind, exif=exif, **options))
        assert image.size == (24, 16), kind
        assert np.abs(pixels(image) - pixels(upright)).max() <= (4 if kind == "JPEG" else 0), kind


def test_damaged_exif_leaves_the_picture():
    data = encode(picture(1), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert decode(data).size == (72, 56)


def test_16_bit_grey_is_scaled_exactly():
    values = np.arange(65536).reshape(256, 256)
    image = decode(png(values[..., None], 16, 0))
    expected = np.rint(values * 255 / 65535)
    assert image.mode == "RGB"
    assert all((pixels(image)[..., channel] == expected).all() for channel in range(3))
    tiff = decode(encode(Image.fromarray(values.astype(np.uint16)), "TIFF"))
    assert (pixels(tiff)[..., 0] == expected).all()


def test_16_bit_rgb_is_scaled_to_a_level():
    values = np.random.default_rng(0).integers(0, 65536, (40, 30, 3))
    assert np.abs(pixels(decode(png(values, 16, 2))) - values * 255 / 65535).max() < 1.0  # Pillow keeps the high byte


def test_32_bit_integers_only_within_16_bits():
    inside = Image.fromarray(np.array([[0, 257], [65535, 128]], dtype=np.int32))
    assert pixels(decode(encode(inside, "TIFF")))[..., 0].tolist() == [[0, 1], [255, 0]]
    outside = Image.fromarray(np.array([[0, 70000]], dtype=np.int32))
    with pytest.raises(UnreadableImage, match="from 0 to 70000; expected 16 bits"):
        decode(encode(outside, "TIFF"))
    with pytest.raises(UnreadableImage, match="floating-point"):
        decode(encode(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"))


def test_cmyk_palette_grey_and_bilevel():
    rgb = picture(3)
    cmyk = decode(encode(rgb.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert cmyk.mode == "RGB"
    assert np.abs(pixels(cmyk) - pixels(rgb)).mean() < 3
    palette = rgb.quantize(256)
    assert (pixels(decode(encode(palette, "PNG"))) == pixels(palette.convert("RGB"))).all()
    grey = decode(encode(rgb.convert("L"), "PNG"))
    assert grey.mode == "RGB"
    assert (pixels(grey)[..., 0] == pixels(rgb.convert("L"))).all()
    assert set(pixels(decode(encode(rgb.convert("1"), "PNG"))).ravel().tolist()) == {0, 255}


def test_transparent_pixels_lie_on_white():
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[0, 2] = (10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)
    image = pixels(decode(encode(Image.fromarray(rgba), "PNG")))
    assert image[0].tolist() == [[10, 20, 30], [255, 255, 255], [127, 127, 127]]
    grey = decode(encode(Image.fromarray(rgba).convert("LA"), "PNG"))
    assert pixels(grey)[0, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(decode(encode(palette, "PNG", transparency=1)))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encode(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert pixels(decode(data))[0, 0].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "not an image of a known kind"),
        (encode(picture(1))[:900], "truncated"),
        (encode(picture(1), "PNG")[:900], "truncated|not enough"),
        (encode(picture(1))[:30], "."),
    ],
)
def test_what_cannot_be_read_is_named(data, reason):
    with pytest.raises(UnreadableImage, match=f"photo.jpg: .*{reason}") as raised:
        decode(data, "photo.jpg")
    assert "\n" not in str(raised.value)
    assert "0x" not in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_an_image_object_is_taken_too():
    assert decode(picture(1).convert("L")).mode == "RGB"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_shrink_first_and_keep_their_detail(kind):
    large = picture(5, 1600, 1200)
    multi_crop = MultiCrop(Crops(global_size=64, local_size=32))
    small = decode(encode(large, kind), reduction=multi_crop.reduction)
    # smallest crops: sqrt(.32 * .75 * 1600 * 1200) / 64 = 10.6 and sqrt(.05 * .75 * 1600 * 1200) / 32 = 8.4 times
    assert small.size == (400, 300)
    direct = np.asarray(large.resize((40, 30), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels(small.resize((40, 30), Image.Resampling.BICUBIC)) - direct).mean() < 1.5
    assert decode(encode(picture(5, 500, 375), kind), reduction=MultiCrop(Crops()).reduction).size == (500, 375)


def test_reduction_never_leaves_a_crop_short_of_pixels():
    for crops in (Crops(), Crops(global_size=224, local_size=96, gram_size=448), Crops(global_size=32, locals=0)):
        reduction = MultiCrop(crops).reduction
        for width, height in ((100, 80), (640, 480), (4000, 3000), (9000, 400)):
            factor = reduction(width, height)
            area = width * height / factor**2
            assert factor == 1 or (crops.global_scale[0] * 0.75 * area) ** 0.5 >= 2 * (
                crops.gram_size or crops.global_size
            )
            assert (
                factor == 1 or not crops.locals or (crops.local_scale[0] * 0.75 * area) ** 0.5 >= 2 * crops.local_size
            )
