"""KoLeo: spreads the CLS features of a group of images by pushing each away from its nearest neighbour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ext import Collectives

from ..data.batch import CropBatch
from .outputs import LossPart, Outputs, Targets


@dataclass(frozen=True, kw_only=True)
class KoLeoLoss:
    """-mean log(||x - nearest(x)|| + 1e-8) over L2-normalised CLS features, summed over the global crops.

    The neighbour is looked for among `group` consecutive images of the global batch (None: the rank's own images);
    features are gathered from other ranks only where a group spans several.

    Errors: ValueError when a group has fewer than two images or does not divide the batch.
    Source: paper section 3.2, spec 3.5 (both global crops, weight 0.1 each).
    """

    weight: float
    group: int | None = None

    def __call__(
        self, outputs: Outputs, targets: Targets, batch: CropBatch, collectives: Collectives
    ) -> list[LossPart]:
        features = outputs.cls.transpose(0, 1)  # (B, G, D)
        group = features.shape[0] if self.group is None else self.group
        if features.shape[0] % group:
            features = collectives.all_gather(features)  # (W B, G, D)
        if group < 2 or features.shape[0] % group:
            raise ValueError(
                f"koleo: a nearest neighbour needs groups of at least 2 images that divide the batch of "
                f"{features.shape[0]}, got losses.koleo_group = {group}"
            )
        groups = features.unflatten(0, (-1, group)).permute(2, 0, 1, 3)  # (G, groups, group, D)
        per_crop = _nearest_neighbour_loss(groups).mean(dim=(1, 2))  # (G,)
        return [LossPart("koleo", per_crop.sum(), self.weight)]


def _nearest_neighbour_loss(features: Tensor, epsilon: float = 1e-8) -> Tensor:
    """-log distance to the nearest other row of the same group: (..., group, D) -> (..., group), in fp32 or wider."""
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
        with torch.no_grad():
            # fp64: in fp32 every point closer than 3e-4 is as good a neighbour, and which one wins depends on the shape
            exact = F.normalize(features.double(), dim=-1)
            similarity = exact @ exact.transpose(-1, -2)  # (..., group, group)
            similarity.diagonal(dim1=-2, dim2=-1).fill_(-2.0)  # below every cosine: never its own neighbour
            nearest = similarity.argmax(dim=-1, keepdim=True)  # (..., group, 1)
        neighbour = torch.gather(unit, -2, nearest.expand_as(unit))
        # the difference itself, not 2 - 2 cos, which cancels for near duplicates; epsilon inside it as in the original
        distance = (unit - neighbour + epsilon).norm(dim=-1)
        return -torch.log(distance + epsilon)
