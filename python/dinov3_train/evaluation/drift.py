"""How far features have moved from those of the weights a run began with, on a fixed panel of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_train.data.decode import UnreadableImage, decode
from dinov3_train.data.sources import Source
from dinov3_train.evaluation.view import View

NEAR, FAR = 0.9, 0.7  # cosines
BATCH = 16  # images per forward pass


@dataclass(frozen=True)
class Drift:
    """Mean cosine over the panel between features then and now: of the CLS, and of the patch at the same place."""

    cls: float
    patches: float

    @property
    def words(self) -> str:
        """What the numbers mean, in plain words."""
        numbers = f"cosine with the starting weights: CLS {self.cls:.3f}, patches {self.patches:.3f}"
        lowest = min(self.cls, self.patches)
        if lowest >= NEAR:
            return f"{numbers}: the features are still close to where they began"
        if lowest >= FAR:
            return f"{numbers}: the features have clearly moved; check on held-out images that they got better"
        return (
            f"{numbers}: warning: the features have moved far, and what the starting weights knew beyond your images "
            "is being lost; a smaller optimizer.lr, a longer optimizer.backbone_ramp or fewer run.steps keep more of it"
        )


@dataclass(frozen=True)
class Panel:
    """Fixed images and what the starting weights see in them: pixels uint8 (n, 3, Y, X), cls (n, D), patches (n, N, D),
    both fp32 on the CPU, of unit length."""

    pixels: Tensor
    view: View
    cls: Tensor
    patches: Tensor


def panel(backbone: nn.Module, source: Source, view: View, count: int) -> Panel:
    """`count` readable images spread evenly over the source, with the features of the starting weights.

    Errors: ValueError when none of the images looked at can be read.
    """
    found = []
    for number in range(min(count, len(source))):
        index = number * len(source) // min(count, len(source))
        try:
            found.append(view.pixels(decode(source.read(index), source.name(index))))
        except (UnreadableImage, OSError):  # counted and named by training itself
            continue
    if not found:
        raise ValueError(f"run.drift_images: none of the {min(count, len(source))} images of the panel can be read")
    pixels = torch.stack(found)
    return Panel(pixels, view, *_features(backbone, pixels, view))


def drift(begun: Panel, backbone: nn.Module) -> Drift:
    """How far `backbone` is from the weights the panel was made with."""
    cls, patches = _features(backbone, begun.pixels, begun.view)
    return Drift(cls=float((cls * begun.cls).sum(-1).mean()), patches=float((patches * begun.patches).sum(-1).mean()))


@torch.no_grad()
def _features(backbone: nn.Module, pixels: Tensor, view: View) -> tuple[Tensor, Tensor]:
    device, was_training = next(backbone.parameters()).device, backbone.training
    backbone.eval()
    parts = [backbone.features(view.normalized(part.to(device))) for part in pixels.split(BATCH)]
    backbone.train(was_training)
    cls, patches = (torch.cat([getattr(part, name).float().cpu() for part in parts]) for name in ("cls", "patches"))
    return F.normalize(cls, dim=-1), F.normalize(patches, dim=-1)
