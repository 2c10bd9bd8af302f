"""Checkpoints: the whole state of a run, written aside and renamed, so that a killed run resumes bit for bit.

`RUN/checkpoints/step_00001000/` is a torch.distributed.checkpoint folder with weights, EMA, optimiser, counters, random
states and the effective config. `RUN/history/step_....safetensors` is the thin history: teacher backbones only.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException

from .distributed import barrier
from .step import TrainState

STEP_FOLDER = re.compile(r"step_(\d{8})$")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder; `keep` newest stay. `group`: the ranks that hold the state; None: all."""

    folder: Path
    keep: int
    group: dist.ProcessGroup | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return saved_steps(self.folder)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def save(self, state: TrainState, config_yaml: str) -> Path:
        """Write the state at `state.step`, then drop the oldest beyond `keep`.

        Errors: OSError when it cannot be written (a full disk, say); earlier checkpoints are untouched.
        """
        target, partial = self.path(state.step), self.folder / f"step_{state.step:08d}.partial"
        first = not dist.is_initialized() or dist.get_rank(self.group) == 0
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        barrier(self.group)
        try:
            _write(_entries(state) | {"config": config_yaml, "random": _random_state()}, partial, self.group)
        except (Exception, CheckpointException) as error:  # torch's own is no Exception
            free = shutil.disk_usage(self.folder).free / 2**20  # before the unfinished files go
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"checkpoint of step {state.step} could not be written to {self.folder}: {_root(error)}; "
                f"{free:.0f} MiB free on that disk; newest complete checkpoint: {max(self.steps(), default='none')}"
            ) from error
        if first:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            _sync_folder(self.folder)
            for step in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(step), ignore_errors=True)
        barrier(self.group)
        return target

    def load(self, state: TrainState, step: int) -> None:
        """Fill the state from the checkpoint of `step`.

        Errors: ValueError when the checkpoint holds other tensors than the state (another architecture).
        """
        target = self.path(step)
        entries = _entries(state) | {"config": "", "random": _random_state()}
        try:
            _check_same_tensors(entries, target)
            _read(entries, target, self.group)
        except ValueError:
            raise
        except (Exception, CheckpointException) as error:  # a damaged file makes torch raise many types
            earlier = [self.path(other).name for other in self.steps() if other < step]
            instead = f"delete it to continue from {earlier[-1]}" if earlier else "there is no earlier one"
            raise ValueError(f"checkpoint {target} cannot be read ({_root(error)}); {instead}") from error
        state.step, state.skipped, state.images = entries["step"], entries["skipped"], entries["images"]
        torch.set_rng_state(entries["random"]["cpu"])
        if "cuda" in entries["random"]:
            torch.cuda.set_rng_state(entries["random"]["cuda"])


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending; unfinished writes do not count."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := STEP_FOLDER.search(entry.name)))


def load_teacher(path: Path, networks: torch.nn.Module) -> None:
    """Fill networks with the EMA teacher's weights of one checkpoint, tensors of the backbone and both heads."""
    entries = {"teacher": networks.state_dict()}
    _check_same_tensors(entries, path, complete=False)
    _read(entries, path, alone=True)


def load_start(path: Path, state: TrainState, *, student: str, optimizer: bool) -> None:
    """Begin a stage with another run's checkpoint: student, EMA teacher and heads; step and counters stay at 0.

    Args:
        path: the checkpoint.
        state: filled in place.
        student: "student", or "teacher" where the student begins as the EMA teacher.
        optimizer: fill AdamW's moments too.

    Errors: ValueError when the checkpoint holds other tensors than the state (another architecture, other losses).
    """
    entries = {name: value for name, value in _entries(state).items() if name in ("student", "teacher", "optimizer")}
    wanted = {"teacher"} | ({"student"} if student == "student" else set()) | ({"optimizer"} if optimizer else set())
    entries = {name: value for name, value in entries.items() if name in wanted}
    _check_same_tensors(entries, path, complete=False)
    _read(entries, path, alone=True)
    if student == "teacher":
        state.student.load_state_dict(state.teacher.state_dict())


def checkpoint_config(path: Path) -> str:
    """The effective config, YAML, that a checkpoint was written with."""
    entries = {"config": ""}
    _read(entries, path, alone=True)
    return entries["config"]


def save_history(folder: Path, state: TrainState) -> Path:
    """Keep the teacher backbone of this step, for choosing a Gram teacher later."""
    folder.mkdir(parents=True, exist_ok=True)
    target = history_file(folder, state.step)
    partial = target.with_suffix(".partial")
    save_file(
        {k: v.contiguous() for k, v in state.teacher.backbone.state_dict().items()}, partial, {"step": str(state.step)}
    )
    os.replace(partial, target)
    return target


def history_file(folder: Path, step: int) -> Path:
    """Where the thin history in `folder` keeps the teacher backbone of a step."""
    return folder / f"step_{step:08d}.safetensors"


def _entries(state: TrainState) -> dict:
    """The state as nested dictionaries; optimiser moments under parameter names, so that groups may change."""
    moments = {}
    for name, parameter in state.student.named_parameters():
        if parameter in state.optimizer.state:
            moments[name] = state.optimizer.state[parameter]
    gram = state.gram_teacher
    own = gram is not None and gram.backbone is not state.teacher.backbone  # the live EMA is there already
    return {
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict(),
        "optimizer": moments,
        "step": state.step,
        "skipped": state.skipped,
        "images": state.images,
    } | ({"gram_teacher": gram.backbone.state_dict()} if own else {})


def _random_state() -> dict:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | cuda


def _write(entries: dict, path: Path, group: dist.ProcessGroup | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that no process group exists; that is meant here
        dcp.save(entries, checkpoint_id=path, process_group=group, no_dist=_one_rank(group))


def _one_rank(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_world_size(group) == 1


def _read(entries: dict, path: Path, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
    """Fill the entries. `alone`: this rank reads for itself, whatever the others do; else all ranks must call."""
    if not path.is_dir():
        raise ValueError(f"checkpoint: expected a folder, got {path}, which does not exist")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(entries, checkpoint_id=path, process_group=group, no_dist=alone or _one_rank(group))


def _check_same_tensors(entries: dict, path: Path, complete: bool = True) -> None:
    """Every tensor of the state must be in the checkpoint with the same shape, and, if `complete`, nothing more."""
    saved = {
        name: tuple(entry.size)
        for name, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    wanted = {name: tuple(value.shape) for name, value in _flat(entries) if isinstance(value, torch.Tensor)}
    if not complete:
        saved = {name: shape for name, shape in saved.items() if name.split(".")[0] in entries}
    wanted = {name: shape for name, shape in wanted.items() if not name.startswith("random.")}
    saved = {name: shape for name, shape in saved.items() if not name.startswith("random.")}
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    reshaped = [
        f"{n}: run {wanted[n]}, checkpoint {saved[n]}"
        for n in sorted(wanted.keys() & saved.keys())
        if wanted[n] != saved[n]
    ]
    if missing or unexpected or reshaped:
        lists = [("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)]
        detail = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in lists
            if names
        )
        raise ValueError(f"checkpoint {path} is of another architecture: {detail}")


def _flat(entries: dict, prefix: str = "") -> list[tuple[str, object]]:
    flat = []
    for key, value in entries.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return flat


def _root(error: BaseException) -> str:
    """The reason under torch's wrapping, one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
