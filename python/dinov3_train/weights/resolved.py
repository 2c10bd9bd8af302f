"""What every command gets when it asks for a backbone, wherever the weights come from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config import Backbone, ConvNeXtBackbone
from ..evaluation.view import View
from ..models.architectures import side_multiple
from ..models.heads import ProjectionHead


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A backbone ready to use, and what is known about it.

    backbone: evaluation mode, fp32, CPU, without gradients; has `features(images (S, 3, Y, X)) -> Features`,
        `embed_dim`, `patch_size`, `intermediate_layers`.
    architecture: what it was built from.
    heads: "dino_head" and "ibot_head" where the source has them, else None.
    mean, std: per channel, of pixels in [0, 1], that the weights were trained with.
    size: side in pixels the weights are commonly used at.
    origin: where the weights came from, in words; licence: what is known about the terms they are under.
    """

    backbone: nn.Module
    architecture: Backbone | ConvNeXtBackbone
    heads: dict[str, ProjectionHead] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    origin: str
    licence: str

    @property
    def side_multiple(self) -> int:
        """Pixels of which image sides must be multiples."""
        return side_multiple(self.architecture)

    def view(self, size: int | None = None) -> View:
        """How images are shown to the backbone: `size` or the weights' own side in pixels, and their normalisation."""
        return View(size=size or self.size, mean=self.mean, std=self.std)
