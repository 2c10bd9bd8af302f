"""Weights in and out: `resolve(spec)` gives a ready backbone from wherever the weights are."""

from __future__ import annotations

from pathlib import Path

from .files import SUFFIXES, from_file, from_folder
from .hub import from_hub, from_timm_name
from .resolved import Resolved
from .runs import from_run, run_of

__all__ = ["Resolved", "resolve"]

EXPECTED = (
    "a run folder or one of its checkpoints, a file (.safetensors, .pth), a folder of transformers or timm, "
    "hf:OWNER/NAME or timm:NAME"
)


def resolve(spec: str | Path, *, step: int | None = None) -> Resolved:
    """A backbone by its name.

    Args:
        spec: a run folder or one of its checkpoints or history files; a file: official `.pth`, safetensors of any
            dialect, an export of this package; a folder that transformers or timm wrote; `hf:OWNER/NAME`; `timm:NAME`.
        step: checkpoint of a run; None: the newest; 0: the weights it started from.

    Errors: ValueError, one line, when there is no such thing, it cannot be read or reached, or a tensor is missing,
        unexpected or of another shape.
    """
    text, path = str(spec), Path(spec)
    kind, separator, name = text.partition(":")
    is_run = not separator and run_of(path) is not None
    if step is not None and not is_run and (separator or path.exists()):
        raise ValueError(f"step: expected a run folder to take a checkpoint of, got {text!r}")
    if separator and kind in ("hf", "timm") and name:
        return {"hf": from_hub, "timm": from_timm_name}[kind](name)
    if is_run:
        return from_run(path, step)
    if path.is_file() or path.suffix in SUFFIXES:
        return from_file(path)
    if (path / "config.json").is_file():
        return from_folder(path, origin=text)
    state = "is none of these" if path.is_dir() else "does not exist"
    raise ValueError(f"backbone: expected {EXPECTED}, got {text!r}, which {state}")
