"""Weights in and out: `resolve(spec)` gives a ready backbone from wherever the weights are."""

from __future__ import annotations

from pathlib import Path

from .resolved import Resolved
from .runs import from_run

__all__ = ["Resolved", "resolve"]


def resolve(spec: str | Path, *, step: int | None = None) -> Resolved:
    """A backbone by its name.

    Args:
        spec: a run folder or one of its checkpoints.
        step: checkpoint of a run; None: the newest; 0: the weights it started from.

    Errors: ValueError, one line, when there is no such thing or it does not fit.
    """
    return from_run(Path(spec), step)
