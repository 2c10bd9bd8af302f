"""A source that lives in memory and a backbone whose features can be computed by hand."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainFeatures:
    """The fields of `Features` that evaluation reads."""

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


class MeanColour(nn.Module):
    """CLS = mean colour of the image (S, 3); a patch token = mean colour of its patch (S, N, 3)."""

    embed_dim = 3

    def __init__(self, patch_size: int = 8):
        super().__init__()
        self.patch_size = patch_size
        self.gain = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def features(self, images: Tensor) -> PlainFeatures:
        """Images (S, 3, Y, X) normalised."""
        self.modes.append(self.training)
        assert not torch.is_grad_enabled()
        pooled = nn.functional.avg_pool2d(images, self.patch_size) * self.gain  # (S, 3, h, w)
        return PlainFeatures(images.mean(dim=(2, 3)), pooled.flatten(2).mT, tuple(pooled.shape[2:]))


class MemorySource:
    """Colour noise in two classes, "dark" and "bright"; any number can be damaged or without a label."""

    def __init__(self, count: int, *, damaged: tuple[int, ...] = (), unlabelled: tuple[int, ...] = (), side: int = 20):
        self.classes = ["dark", "bright"]
        self.count, self.damaged, self.unlabelled, self.side = count, damaged, unlabelled, side

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """`<class>/<index>.png`."""
        return f"{self.classes[index % 2]}/{index}.png"

    def label(self, index: int) -> int | None:
        """0 dark, 1 bright, None where unlabelled."""
        return None if index in self.unlabelled else index % 2

    def image(self, index: int) -> Image.Image:
        """The image before it was encoded."""
        noise = np.random.default_rng(index).integers(0, 100, (self.side, self.side + index % 3, 3))
        return Image.fromarray((noise + 150 * (index % 2)).astype(np.uint8))

    def read(self, index: int) -> bytes:
        """PNG bytes, cut in the middle when damaged."""
        buffer = io.BytesIO()
        self.image(index).save(buffer, "png")
        return buffer.getvalue()[: 60 if index in self.damaged else None]


class PixelSource(MemorySource):
    """Noise images, dark on the left and bright on the right of a line, with masks that say which pixel is which.

    `extras` replaces companions: {(number, suffix): bytes or None}. Even images belong to the group "even".
    """

    def image(self, index: int) -> Image.Image:
        """Dark on the left, bright on the right."""
        noise = np.random.default_rng(index).integers(0, 100, (self.side, self.side, 3))
        return Image.fromarray((noise + 150 * self.mask(index)[..., None]).astype(np.uint8))

    def mask(self, index: int) -> np.ndarray:
        """(Y, X) of 0 left of the line and 1 right of it."""
        columns = np.arange(self.side) >= self.side * (2 + index % 4) // 8
        return np.repeat(columns[None], self.side, 0).astype(np.uint8)

    extras: dict = {}  # noqa: RUF012

    def read_extra(self, index: int, suffix: str) -> bytes | None:
        """The mask as PNG."""
        if (index, suffix) in self.extras:
            return self.extras[index, suffix]
        return png(self.mask(index)) if suffix == "mask.png" else None

    def field(self, index: int, name: str) -> str | None:
        """Its parity."""
        return ("even", "odd")[index % 2] if name == "parity" else None


def png(values: np.ndarray) -> bytes:
    """8-bit, or 16-bit for uint16."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


class Noise(nn.Module):
    """Features (S, D) and (S, N, D) that have nothing to do with the image, the same for the same pixels."""

    embed_dim, patch_size = 8, 8

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def features(self, images: Tensor) -> PlainFeatures:
        """Images (S, 3, Y, X)."""
        grid = images.shape[2] // 8, images.shape[3] // 8
        rows = []
        for image in images:
            seed = int(image.double().sum().mul(1e6).abs()) % 2**31
            generator = torch.Generator().manual_seed(seed)
            rows.append(torch.randn(1 + grid[0] * grid[1], self.embed_dim, generator=generator))
        tokens = torch.stack(rows) * self.gain
        return PlainFeatures(tokens[:, 0], tokens[:, 1:], grid)


@pytest.fixture(name="pixel_source")
def pixel_source_fixture() -> type[PixelSource]:
    """The class of the source with masks."""
    return PixelSource


@pytest.fixture(name="noise")
def noise_fixture() -> type[Noise]:
    """The class of the backbone that sees nothing."""
    return Noise


@pytest.fixture(name="as_png")
def as_png_fixture():
    """Encodes an array."""
    return png


@pytest.fixture(name="mean_colour")
def mean_colour_fixture() -> type[MeanColour]:
    """The backbone's class."""
    return MeanColour


@pytest.fixture(name="memory_source")
def memory_source_fixture() -> type[MemorySource]:
    """The source's class."""
    return MemorySource
