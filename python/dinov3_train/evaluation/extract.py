"""Frozen features of every image of a source, and the files that keep them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinov3_train.evaluation.reading import prepared, warn_unreadable
from dinov3_train.evaluation.view import View

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source
    from dinov3_train.models.vit import Features

UNLABELLED = -1
POOLINGS = ("cls", "patch_mean", "cls+patch")
PRECISIONS = ("fp32", "bf16")
SUFFIXES = (".safetensors", ".npy")


@dataclass(frozen=True)
class Extracted:
    """Features of n images.

    features: (n, D), fp32, CPU; "cls+patch" has 2 D columns, the CLS first.
    labels: (n,), int64, -1 where the source has no label.
    names: n names, as the source gives them; unreadable: the names that were left out.
    classes: names of the classes in label order, or None; settings: how the features were made.
    numbers: n numbers of the images in their source.
    groups: n texts, what the source says about each image under one name (None: nothing), or None as a whole.
    """

    features: Tensor
    labels: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    unreadable: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    numbers: tuple[int, ...] = ()
    groups: tuple[str | None, ...] | None = None

    def __post_init__(self):
        counts = (len(self.features), len(self.labels), len(self.names))
        if self.features.ndim != 2 or len(set(counts)) != 1:
            shape = tuple(self.features.shape)
            raise ValueError(
                "Extracted: expected features (n, D), n labels and n names, "
                f"got features {shape}, {counts[1]} labels and {counts[2]} names"
            )


def extract(
    backbone: nn.Module,
    source: Source,
    view: View,
    *,
    pooling: str = "cls",
    batch_size: int = 64,
    precision: str = "fp32",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Run every readable image of `source` through `backbone.features`, on the backbone's device, without gradients.

    "cls": the normed CLS token; "patch_mean": the mean of the normed patch tokens; "cls+patch": both, side by side.

    Args:
        backbone: has `features(images (S, 3, Y, X)) -> Features`; its train or eval mode is as before afterwards.
        source: has `len`, `name(i)`, `read(i)`, `label(i)`, `classes`.
        view: size, crop and normalisation of the images.
        batch_size: images per forward pass, at least 1.
        precision: "fp32", or "bf16" for autocast; features are fp32 either way.
        workers: threads that decode and resize; None: one per core, at most 8.
        progress: called with (images done, images in all) after each batch.

    Unreadable images are left out, named in the result and in one warning.
    Errors: ValueError for an unknown pooling or precision, a batch below 1, a source without one readable image.
    """
    _require("pooling", pooling, POOLINGS)
    _require("precision", precision, PRECISIONS)
    if batch_size < 1:
        raise ValueError(f"extract: batch_size expects at least 1, got {batch_size}")
    pooled, numbers, unreadable = [], [], []
    with evaluating(backbone):
        batches = prepared(
            source,
            lambda image, beside, name, number: view.pixels_of(image, number),
            batch_size=batch_size,
            workers=workers,
        )
        for readable, failed in batches:
            if readable:
                pixels = torch.stack([made for _, made in readable])
                pooled.append(pool(forward(backbone, pixels, view, precision), pooling).float().cpu())
            numbers += [number for number, _ in readable]
            unreadable += failed
            if progress is not None:
                progress(len(numbers) + len(unreadable), len(source))
    if not numbers:
        first = f"; first: {unreadable[0]}" if unreadable else ""
        raise ValueError(f"extract: expected at least one readable image, got {len(source)} entries and none{first}")
    warn_unreadable("extract", unreadable, len(source))
    labels = [source.label(number) for number in numbers]
    return Extracted(
        features=torch.cat(pooled),
        labels=torch.tensor([UNLABELLED if label is None else int(label) for label in labels], dtype=torch.int64),
        names=tuple(source.name(number) for number in numbers),
        classes=None if source.classes is None else tuple(source.classes),
        unreadable=tuple(unreadable),
        settings={**view.to_dict(), "pooling": pooling, "precision": precision},
        numbers=tuple(numbers),
    )


def grouped(extracted: Extracted, source: Source, name: str | None) -> Extracted:
    """The same features with what the source they came from says about each image under `name` (None: as they are).

    Errors: ValueError when it says nothing of any image.
    """
    return extracted if name is None else replace(extracted, groups=groups_of(source, extracted.numbers, name))


def groups_of(source: Source, numbers: Sequence[int], name: str) -> tuple[str | None, ...]:
    """What the source says about each image under `name`, as text. Errors: ValueError when it says nothing of any."""
    found = [source.field(number, name) for number in numbers]
    if all(value is None for value in found):
        raise ValueError(
            f"group: expected a column of the manifest or an entry of the images' .json, got {name!r}, which none of "
            f"{len(found)} images has"
        )
    return tuple(None if value is None else str(value) for value in found)


def pool(features: Features, pooling: str) -> Tensor:
    """(S, D) or, for "cls+patch", (S, 2 D): one row per image."""
    _require("pooling", pooling, POOLINGS)
    if pooling == "cls":
        return features.cls
    mean = features.patches.mean(dim=1)
    return mean if pooling == "patch_mean" else torch.cat([features.cls, mean], dim=1)


# Not inference_mode: tables the backbone caches in it could not serve a later training step.
@torch.no_grad()
def forward(
    backbone: nn.Module, pixels: Tensor, view: View, precision: str = "fp32", layer: int | None = None
) -> Features:
    """Normed features of pixels uint8 (n, 3, Y, X), on the backbone's device.

    precision: "fp32", or "bf16" for autocast; layer: number of a block from 0; None: the last.
    Errors: ValueError for a layer outside the depth.
    """
    device = next(backbone.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    images = view.normalized(pixels.to(device))
    with autocast:
        return backbone.features(images) if layer is None else backbone.intermediate_layers(images, [layer])[0]


@contextlib.contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """The backbone in evaluation mode, and in its own mode again afterwards."""
    was_training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(was_training)


def save_features(extracted: Extracted, path: str | Path) -> Path:
    """Write features as .safetensors (`features`, `labels`) or .npy (features alone), and `<path>.json` beside them.

    The JSON holds names, labels, classes, unreadable images and settings, row by row. Both files are written under a
    temporary name and renamed. Returns the path of the features. Errors: ValueError for another suffix.
    """
    path = _checked(path, "save_features")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, extracted.features.numpy())
        else:
            save_file({"features": extracted.features.contiguous(), "labels": extracted.labels.contiguous()}, temporary)
        temporary.replace(path)
        temporary.write_text(json.dumps(_sidecar(extracted), indent=1) + "\n")
        temporary.replace(_sidecar_path(path))
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_features(path: str | Path) -> Extracted:
    """The inverse of `save_features`. Errors: ValueError naming the file that is missing or does not fit the other."""
    path = _checked(path, "load_features")
    for needed in (path, _sidecar_path(path)):
        if not needed.is_file():
            raise ValueError(f"load_features: expected features and the .json beside them, {needed} does not exist")
    try:
        about = json.loads(_sidecar_path(path).read_text())
        features = torch.from_numpy(np.load(path)) if path.suffix == ".npy" else load_file(path)["features"]
        return Extracted(
            features=features,
            labels=torch.tensor(about["labels"], dtype=torch.int64),
            names=tuple(about["names"]),
            classes=None if about["classes"] is None else tuple(about["classes"]),
            unreadable=tuple(about["unreadable"]),
            settings=about["settings"],
            numbers=tuple(about.get("numbers", ())),
            groups=None if about.get("groups") is None else tuple(about["groups"]),
        )
    except (KeyError, SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"load_features: {path} was not written by save_features: {error}") from error


def _sidecar(extracted: Extracted) -> dict:
    kept = ("names", "classes", "unreadable", "settings", "numbers", "groups")
    about = {name: getattr(extracted, name) for name in kept}
    return about | {"labels": extracted.labels.tolist(), "shape": list(extracted.features.shape)}


def _sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _checked(path: str | Path, function: str) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{function}: path expects a suffix of {' or '.join(SUFFIXES)}, got {str(path)!r}")
    return path


def _require(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"extract: {argument} expects one of {', '.join(known)}, got {value!r}")
