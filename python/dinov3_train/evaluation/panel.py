"""A fixed panel of images, how a backbone sees it, and all health measures of one look."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dinov3_train.data.batch import patch_grid
from dinov3_train.data.decode import UnreadableImage, decode
from dinov3_train.evaluation import health
from dinov3_train.evaluation.view import View

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source

FINER = 2  # times the panel's side, to see how features change with resolution
BATCH = 16  # images of a forward pass


@dataclass(frozen=True, kw_only=True)
class Panel:
    """n square images: pixels uint8 (n, 3, Y, Y), and the same images at twice the side, (n, 3, 2 Y, 2 Y)."""

    names: tuple[str, ...]
    pixels: Tensor
    finer: Tensor
    view: View

    @property
    def digest(self) -> str:
        """Tells panels apart: of the pixels and their normalisation."""
        pixels = hashlib.sha256(self.pixels.numpy().tobytes())
        pixels.update(repr((tuple(self.pixels.shape), self.view.mean, self.view.std)).encode())
        return pixels.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PanelFeatures:
    """What a backbone makes of a panel, fp32 on the CPU.

    cls: (n, D) normed; patches: (n, h, w, D) normed; raw: (n, h, w, D) before the final norm;
    finer: (n, 2 h, 2 w, D) normed, of the images at twice the side.
    """

    cls: Tensor
    patches: Tensor
    raw: Tensor
    finer: Tensor


def open_panel(source: Source, view: View, *, images: int, patch_size: int, at_least: int | None = None) -> Panel:
    """`images` readable images spread evenly over a source, the same ones each time.

    An unreadable image gives its place to the next one after it that can be read and is not in the panel yet.

    Args:
        source: has `len`, `name(i)`, `read(i)`.
        view: its `size` is the panel's side in pixels.
        images: at least 2, so that images can be told apart.
        patch_size: of the backbone, which must divide the side.
        at_least: so many readable images will do where there are no more; None: `images`.

    Errors: ValueError for fewer than 2 images, an empty source, fewer readable images than asked.
    """
    patch_grid(view.size, patch_size, "panel: size")
    if images < 2:
        raise ValueError(f"panel: images expects at least 2, got {images}")
    total, needed = len(source), images if at_least is None else at_least
    if total < needed:
        raise ValueError(f"panel: expected at least {needed} images, the source has {total or 'none'}")
    finer = replace(view, size=FINER * view.size, short_side=None if view.short_side is None else FINER * view.size)
    taken: set[int] = set()
    names, pixels, enlarged = [], [], []
    for place in range(images):
        for step in range(total):
            index = (place * total // images + step) % total
            if index in taken:
                continue
            taken.add(index)
            try:
                image = decode(source.read(index), source.name(index))
            except (UnreadableImage, OSError):
                continue
            names.append(source.name(index))
            pixels.append(view.pixels(image))
            enlarged.append(finer.pixels(image))
            break
    if len(names) < needed:
        raise ValueError(f"panel: expected {needed} readable images, got {len(names)} of the {total} in the source")
    return Panel(names=tuple(names), pixels=torch.stack(pixels), finer=torch.stack(enlarged), view=view)


# Not inference_mode: tables the backbone caches in it could not serve a later training step.
@torch.no_grad()
def panel_features(backbone: nn.Module, panel: Panel) -> PanelFeatures:
    """Features of the panel, without gradients, on the backbone's device in the backbone's type.

    Args:
        backbone: has `features` and `intermediate_layers`; its train or eval mode is as before afterwards.
        panel: from `open_panel`.
    """
    was_training, device = backbone.training, next(backbone.parameters()).device
    backbone.eval()
    found: dict[str, list[Tensor]] = {"cls": [], "patches": [], "raw": [], "finer": []}
    try:
        for pixels, finer in zip(panel.pixels.split(BATCH), panel.finer.split(BATCH)):
            images = panel.view.normalized(pixels.to(device))
            normed = backbone.features(images)
            raw = backbone.intermediate_layers(images, 1, norm=False)[0]
            enlarged = backbone.features(panel.view.normalized(finer.to(device)))
            found["cls"].append(normed.cls)
            for key, features in (("patches", normed), ("raw", raw), ("finer", enlarged)):
                found[key].append(features.patches.unflatten(1, tuple(features.grid)))
    finally:
        backbone.train(was_training)
    return PanelFeatures(**{key: torch.cat(parts).float().cpu() for key, parts in found.items()})


@torch.no_grad()
def measures(
    features: PanelFeatures,
    *,
    heads: Mapping[str, nn.Module] | None = None,
    temperature: float = 0.1,
    start: Tensor | None = None,
    previous: Tensor | None = None,
) -> dict[str, float]:
    """Every measure of `health` that can be taken of one look at a panel, by key.

    Args:
        features: of the backbone that is judged.
        heads: "dino_head" and "ibot_head", which map CLS tokens and patches (n, D) to prototype logits (n, K), or None.
        temperature: of the softmax over prototypes.
        start, previous: (n, h, w, D) normed patches of the same panel at the start and at the look before, or None.
    """
    patches = features.patches
    found = {
        "locality": health.locality(patches),
        "patch_similarity": health.patch_similarity(patches),
        "cls_patch_similarity": health.cls_patch_similarity(features.cls, patches),
        "image_similarity": health.image_similarity(features.cls),
        "pca_coherence": health.pca_coherence(patches),
        "norm_outliers": health.norm_outliers(features.raw),
        "dimension_peak": health.dimension_peak(features.raw),
        "patch_rank": health.effective_rank(patches.flatten(0, 2)),
        "cls_rank": health.effective_rank(features.cls),
        "resolution_agreement": health.resolution_agreement(patches, features.finer),
        "dense_quality": health.dense_quality(patches),
    }
    for key, rows in (("dino", features.cls), ("ibot", patches.flatten(0, 2))):
        head = (heads or {}).get(f"{key}_head")
        if head is not None:
            parameter = next(head.parameters())
            use = health.prototype_use(head(rows.to(parameter.device, parameter.dtype)), temperature=temperature)
            found |= {f"{key}_use": use.use, f"{key}_entropy": use.entropy, f"{key}_information": use.information}
    if start is not None:
        found |= {"gram_start": health.gram_distance(patches, start), "drift": health.drift(patches, start)}
    if previous is not None:
        found["gram_previous"] = health.gram_distance(patches, previous)
    return found
