"""Every backbone by its name, and the network an architecture describes."""

from __future__ import annotations

import difflib
import math

from dinov3_train.config import Backbone, ConvNeXtBackbone
from dinov3_train.models.convnext import CONVNEXTS, ConvNeXt
from dinov3_train.models.vit import BACKBONES, VisionTransformer

ARCHITECTURES: dict[str, Backbone | ConvNeXtBackbone] = BACKBONES | CONVNEXTS


def architecture(name: str) -> Backbone | ConvNeXtBackbone:
    """The architecture of a name such as `vit_small` or `convnext_tiny`. Errors: ValueError naming the nearest ones."""
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, n=3, cutoff=0.4) or list(ARCHITECTURES)
        raise ValueError(f"architecture: no backbone named {name!r}; nearest: {', '.join(close)}")
    return ARCHITECTURES[name]


def backbone_of(described: Backbone | ConvNeXtBackbone) -> VisionTransformer | ConvNeXt:
    """The network of an architecture, with fresh weights from torch's global random state."""
    return ConvNeXt(described) if isinstance(described, ConvNeXtBackbone) else VisionTransformer(described)


def side_multiple(described: Backbone | ConvNeXtBackbone) -> int:
    """Pixels of which image sides must be multiples: the patch size, of a ConvNeXt also its stride."""
    if isinstance(described, ConvNeXtBackbone):
        return math.lcm(described.stride, described.patch_size)
    return described.patch_size
