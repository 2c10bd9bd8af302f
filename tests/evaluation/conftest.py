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


@pytest.fixture(name="mean_colour")
def mean_colour_fixture() -> type[MeanColour]:
    """The backbone's class."""
    return MeanColour


@pytest.fixture(name="memory_source")
def memory_source_fixture() -> type[MemorySource]:
    """The source's class."""
    return MemorySource
