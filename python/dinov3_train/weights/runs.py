"""Backbones of this package's own runs: the EMA teacher of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..build import networks, run_config
from ..config import Config, from_yaml
from ..train.checkpoint import checkpoint_config, load_teacher, saved_steps
from ..train.networks import Networks
from .resolved import Resolved

OWN = "trained by this run from random weights; no licence but your own applies"


def from_run(run: Path, step: int | None) -> Resolved:
    """The EMA teacher of a run.

    Args:
        run: run folder, or one of its `checkpoints/step_...` folders.
        step: checkpoint to take; None: the newest; 0: the weights the run started from.

    Errors: ValueError when there is no such run or checkpoint (naming those there are).
    """
    if run.parent.name == "checkpoints":
        return _resolved(from_yaml(checkpoint_config(run)), run, str(run))
    config, checkpoint = run_config(run), _checkpoint_of(run, step)
    return _resolved(config, checkpoint, f"{run}, untrained" if checkpoint is None else str(checkpoint))


def _resolved(config: Config, checkpoint: Path | None, origin: str) -> Resolved:
    found: Networks = networks(config)
    if checkpoint is not None:
        load_teacher(checkpoint, found)
    found.eval().requires_grad_(False)
    return Resolved(
        backbone=found.backbone,
        architecture=config.backbone,
        heads={"dino_head": found.dino_head, "ibot_head": found.ibot_head},
        mean=config.crops.mean,
        std=config.crops.std,
        size=config.crops.global_size,
        origin=origin,
        licence=OWN,
    )


def _checkpoint_of(run: Path, step: int | None) -> Path | None:
    steps = saved_steps(run / "checkpoints")
    if step == 0:
        return None
    if step is not None and step not in steps:
        raise ValueError(
            f"{run}: no checkpoint of step {step}; there are {steps or 'none'}, and 0 is the untrained start"
        )
    if not steps:
        raise ValueError(f"{run}: the run has no checkpoint yet; step=0 gives its untrained start")
    return run / "checkpoints" / f"step_{step or steps[-1]:08d}"
