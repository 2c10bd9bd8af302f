"""Backbones of this package's own runs: the EMA teacher of a checkpoint, or of the thin history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..build import networks, run_config, start_checkpoint
from ..config import Config, from_yaml
from ..train.checkpoint import STEP_FOLDER, checkpoint_config, load_teacher, saved_steps
from ..train.run_folder import RunFolder
from . import licences
from .dialects import network
from .files import read
from .resolved import Resolved


def run_of(path: Path) -> Path | None:
    """The run folder that `path` is, or of which it is a checkpoint or a history file; None when it is none."""
    if path.parent.name in ("checkpoints", "history") and STEP_FOLDER.search(path.stem):
        return path.parent.parent
    return path if RunFolder(path).config.is_file() else None


def from_run(path: Path, step: int | None) -> Resolved:
    """The EMA teacher of a run, with its heads; from the thin history the backbone alone.

    Args:
        path: run folder, one of its `checkpoints/step_...` folders or `history/step_....safetensors` files.
        step: checkpoint to take, or, where it is gone, history file; None: the newest; 0: what the run started from.

    Errors: ValueError when there is no such run or checkpoint (naming those there are).
    """
    if path.parent.name == "checkpoints":
        return _from_checkpoint(from_yaml(checkpoint_config(path)), path, str(path))
    if path.parent.name == "history":
        return _from_history(run_config(path.parent.parent), path)
    config, saved = run_config(path), saved_steps(path / "checkpoints")
    history = path / "history" / f"step_{step or 0:08d}.safetensors"
    if step is not None and step not in saved and history.is_file():
        return _from_history(config, history)
    if step == 0:
        if config.init.weights is not None:
            raise ValueError(f"{path}: it started from {config.init.weights}; name those weights instead of step=0")
        if config.start.run is not None:
            start = start_checkpoint(config)
            return replace(_from_checkpoint(config, start, f"{path}, begun with {start}"), licence=licences.OWN)
        if config.start.run is not None:
            return from_run(Path(config.start.run), None)
        return replace(_from_checkpoint(config, None, f"{path}, untrained"), licence=licences.OWN)
    if step is not None and step not in saved:
        raise ValueError(
            f"{path}: no checkpoint of step {step}; there are {saved or 'none'}, and 0 is the untrained start"
        )
    if not saved:
        raise ValueError(f"{path}: the run has no checkpoint yet; step=0 gives its untrained start")
    checkpoint = path / "checkpoints" / f"step_{step or saved[-1]:08d}"
    return _from_checkpoint(config, checkpoint, str(checkpoint))


def _from_checkpoint(config: Config, checkpoint: Path | None, origin: str) -> Resolved:
    found = networks(config)
    if checkpoint is not None:
        load_teacher(checkpoint, found)
    found.eval().requires_grad_(False)
    heads = {"dino_head": found.dino_head, "ibot_head": found.ibot_head}
    return _resolved(config, found.backbone, heads, origin)


def _from_history(config: Config, path: Path) -> Resolved:
    tensors, _ = read(path)
    return _resolved(config, network(tensors, config.backbone, str(path)), None, str(path))


def _resolved(config: Config, backbone, heads, origin: str) -> Resolved:
    return Resolved(
        backbone=backbone,
        architecture=config.backbone,
        heads=heads,
        mean=config.crops.mean,
        std=config.crops.std,
        size=config.crops.global_size,
        origin=origin,
        licence=config.init.licence or licences.OWN,
    )
