"""Weights in files and folders: official `.pth`, safetensors of any dialect, folders of transformers and timm."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import licences, metadata
from .architecture import Architecture, from_transformers, recognised, recognised_convnext
from .dialects import Parts, network, parts_of, projection_heads
from .metadata import About
from .resolved import Resolved

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # of the weights trained on sat493m
SATELLITE_NAMES = ("sat493m", "eadcf0ff", "a6675841")  # in the names of released files


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What the surroundings of weights say about them; None: they do not say."""

    architecture: Architecture | None = None
    head_width: int | None = None
    norm_eps: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    size: int | None = None
    licence: str | None = None


def from_file(path: Path) -> Resolved:
    """The backbone in one file.

    Architecture and normalisation: from what this package wrote into or beside the file, else from a `config.json`
    beside it that is of the same dialect, else from the tensors and the file's name.

    Errors: ValueError when it cannot be read or does not hold one model, whole.
    """
    content, own = read(path)
    if own is None:
        own = beside(path)
    parts = parts_of(content, str(path))
    stated = Stated()
    config = path.parent / "config.json"
    if own is None and path.suffix == ".safetensors" and config.is_file() and _describes_backbone(config):
        stated, dialect = stated_in(path.parent)
        stated = stated if dialect == parts.dialect else Stated()
    return resolved(parts, stated, own, origin=str(path))


def from_folder(folder: Path, *, origin: str, licence: str | None = None) -> Resolved:
    """A folder as transformers or timm write it: `config.json` and `model.safetensors` (or its shards)."""
    stated, _ = stated_in(folder)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"] if not index.is_file() else sorted(set(_json(index)["weight_map"].values()))
    content: dict[str, Tensor] = {}
    own: About | None = None
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{origin}: expected {name} beside its config.json, which is not there")
        tensors, own = read(folder / name)
        content |= tensors
    stated = stated if licence is None else replace(stated, licence=licence)
    return resolved(parts_of(content, origin), stated, own, origin=origin)


def resolved(parts: Parts, stated: Stated, own: About | None, *, origin: str) -> Resolved:
    """Model and facts together; what this package wrote itself goes before what surrounds the weights."""
    try:
        found = own.architecture if own is not None else _architecture(parts, stated)
    except ValueError as error:
        raise ValueError(f"{origin}: {str(error).removeprefix('weights: ')}") from error
    facts = own or stated
    mean, std = statistics(origin, parts)
    return Resolved(
        backbone=network(parts.backbone, found, origin),
        architecture=found,
        heads=projection_heads(parts.heads, origin),
        mean=facts.mean or mean,
        std=facts.std or std,
        size=facts.size or (224 if parts.convnext else 16 * found.patch_size),
        origin=origin if own is None else f"{origin}, exported from {own.origin}",
        licence=facts.licence or licences.of_release(origin),
    )


def _architecture(parts: Parts, stated: Stated) -> Architecture:
    """As stated, else as recognised; a local norm, which no configuration tells, as the weights have it."""
    if parts.convnext:
        return stated.architecture or recognised_convnext(parts.backbone)
    if stated.architecture is not None:
        return replace(stated.architecture, untie_local_cls_norm="local_cls_norm.weight" in parts.backbone)
    found = recognised(parts.backbone, head_width=stated.head_width or parts.head_width, base=parts.base)
    return found if stated.norm_eps is None else replace(found, norm_eps=stated.norm_eps)


def statistics(name: str, parts: Parts) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation of the pixels that released weights were trained with: satellite or ImageNet's.

    By the name; the satellite ViT-L is also the only ViT-L with a local CLS norm.
    """
    satellite = any(part in name for part in SATELLITE_NAMES) or (
        "local_cls_norm.weight" in parts.backbone and parts.backbone["cls_token"].shape[-1] == 1024
    )
    return SATELLITE if satellite else IMAGENET


def stated_in(folder: Path) -> tuple[Stated, str]:
    """What `config.json`, `preprocessor_config.json` and `README.md` of a folder say, and its dialect."""
    config = _json(folder / "config.json")
    licence = card_licence(folder / "README.md")
    if "model_type" in config:
        images = folder / "preprocessor_config.json"
        seen = _json(images) if images.is_file() else {}
        size = seen.get("crop_size") or seen.get("size") or {}
        side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
        return (
            Stated(
                architecture=from_transformers(config),
                mean=_triple(seen.get("image_mean")),
                std=_triple(seen.get("image_std")),
                size=side or config.get("image_size"),
                licence=licence,
            ),
            "transformers",
        )
    if "architecture" not in config:
        raise ValueError(
            f"{folder}: its config.json is neither of transformers (model_type) nor of timm (architecture)"
        )
    if "dinov3" not in config["architecture"] and not config["architecture"].startswith("convnext"):
        raise ValueError(f"{folder}: timm's {config['architecture']} is not a DINOv3 model")
    seen, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    width = arguments["embed_dim"] // arguments["num_heads"] if {"embed_dim", "num_heads"} <= set(arguments) else None
    stated = Stated(
        head_width=width,
        mean=_triple(seen.get("mean")),
        std=_triple(seen.get("std")),
        size=seen["input_size"][-1] if "input_size" in seen else None,
        licence=licence or (licences.named(seen["license"], "its config.json") if seen.get("license") else None),
    )
    return stated, "timm"


def card_licence(card: Path) -> str | None:
    """The licence that the header of a model card names, None without a card or a name."""
    if not card.is_file() or not (text := card.read_text(errors="replace")).startswith("---"):
        return None
    try:
        header = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return None
    if not isinstance(header, dict):
        return None
    name = header.get("license_name") or header.get("license")
    return None if name is None else licences.named(str(name), "its model card")


def read(path: Path) -> tuple[dict, About | None]:
    """What a file holds, and the description this package wrote into its header, if it did.

    Errors: ValueError for another suffix or a file that is missing, cut short or of another kind.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights: expected a file that ends in {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise ValueError(f"weights: {path} does not exist")
    try:
        if path.suffix in PICKLED:
            return torch.load(path, map_location="cpu", weights_only=True), None
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(metadata.KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, None if text is None else metadata.from_json(text, str(path))
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"weights: {path} cannot be read; it may be cut short or of another kind: {reason}") from error


def beside(path: Path) -> About | None:
    """The description this package wrote beside a file that has no header for it."""
    note = path.with_name(path.name + ".json")
    return metadata.from_json(note.read_text(), str(note)) if note.is_file() else None


def _describes_backbone(config: Path) -> bool:
    """Whether a `config.json` that happens to lie beside a file is of transformers' DINOv3 or of timm."""
    found = _json(config)
    return str(found.get("model_type", "")).startswith("dinov3") or "architecture" in found


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"weights: {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"weights: {path} expected keys and values, got {type(found).__name__}")
    return found


def _triple(values: list | None) -> tuple[float, float, float] | None:
    return None if values is None else (float(values[0]), float(values[1]), float(values[2]))
