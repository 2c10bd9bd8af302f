"""Weights by name: `hf:ID` of the Hugging Face hub, `timm:NAME` of timm."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from . import licences
from .dialects import parts_of
from .export import TOLERANCE, compared
from .files import Stated, from_folder, resolved
from .formats import see_timm
from .resolved import Resolved

FILES = ["config.json", "preprocessor_config.json", "README.md", "*.safetensors", "*.safetensors.index.json"]
EXTRA = "pip install 'dinov3-ext[export]'"


def from_hub(repository: str) -> Resolved:
    """A repository of the Hugging Face hub, in transformers' or timm's form.

    Errors: ValueError when the hub's library is missing, the name is unknown, access is not granted, or nothing can be
        reached.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(f"hf:{repository}: needs the library huggingface_hub: {EXTRA}") from error
    where = f"hf:{repository}"
    try:
        with _offline_where_unreachable():
            folder = huggingface_hub.snapshot_download(repository, allow_patterns=FILES)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{where}: access is granted on request only: accept its licence at https://huggingface.co/{repository} "
            "and log in (hf auth login), or take the timm: name of the same weights"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{where}: no such repository on the hub, or it is private and you are not logged in"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{where}: expected hf:OWNER/NAME: {_first(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{where}: the hub cannot be reached (no network, or HF_HUB_OFFLINE is set) and its files are not in the "
            "local cache"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # offline: many types; none of them a mistake in the weights
        raise ValueError(f"{where}: the hub cannot be reached and the files are not here: {_first(error)}") from error
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{where}: it holds no config.json, so it is not a model of transformers or timm")
    found = from_folder(Path(folder), origin=where)
    if found.licence == licences.UNKNOWN:
        found = replace(found, licence=licences.named(None, f"https://huggingface.co/{repository}"))
    return found


def from_timm_name(name: str) -> Resolved:
    """A model of timm with its published weights, which timm downloads.

    Errors: ValueError when timm is missing, the name is unknown, it has no weights, or nothing can be reached.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"timm:{name}: needs the library timm: {EXTRA}") from error
    where = f"timm:{name}"
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        known = timm.list_models("*dinov3*")
        close = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.4) or known[:3]
        raise ValueError(f"{where}: timm has no model of this name; nearest: {', '.join(close)}")
    try:
        with _quiet(), torch.device("meta"):
            empty = timm.create_model(name, pretrained=False, num_classes=0)
        transformer = hasattr(empty, "rope")
        if not transformer and type(empty).__name__ != "ConvNeXt":
            raise ValueError(
                f"{type(empty).__name__} is neither a vision transformer with rotary positions nor a ConvNeXt"
            )
        with _quiet(), _offline_where_unreachable():
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm and the hub raise what they like; the reason is in the first line
        raise ValueError(f"{where}: timm cannot give these weights: {_first(error)}") from error
    seen = model.pretrained_cfg
    stated = Stated(
        head_width=model.embed_dim // model.blocks[0].attn.num_heads if transformer else None,
        norm_eps=(model.norm if transformer else model.head.norm).eps,
        mean=tuple(seen["mean"]) if seen.get("mean") else None,
        std=tuple(seen["std"]) if seen.get("std") else None,
        size=seen["input_size"][-1] if seen.get("input_size") else None,
        licence=licences.named(seen.get("license"), "timm's configuration"),
    )
    found = resolved(parts_of(model.state_dict(), where), stated, None, origin=where)
    _, difference, deviation = compared(found, see_timm(model, found))
    if not difference <= TOLERANCE * deviation:  # its keys are ours, but something else in it is not
        raise ValueError(
            f"{where}: not a DINOv3 model: with its weights our features differ from timm's by up to {difference:.2g}"
        )
    return found


@contextlib.contextmanager
def _offline_where_unreachable() -> Iterator[None]:
    """The hub's own offline mode where it does not answer: files that are here serve, and nobody waits for retries."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session
    except ImportError:  # timm without the hub says so itself
        yield
        return
    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whatever the HTTP library of this release raises
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own progress lines: what matters is in the error or in the result."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _first(error: BaseException) -> str:
    """The first line of the reason."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
