"""A run on disk: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `history/`, `tensorboard/`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from .checkpoint import Checkpoints, history_file, saved_steps


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def history(self) -> Path:
        return self.path / "history"

    @property
    def health(self) -> Path:
        return self.path / "health"

    def history_file(self, step: int) -> Path:
        return history_file(self.history, step)

    def history_steps(self) -> list[int]:
        """Steps of the thin history, ascending."""
        return sorted(int(path.stem.removeprefix("step_")) for path in self.history.glob("step_*.safetensors"))

    def checkpoints(self, keep: int = 3, group: dist.ProcessGroup | None = None) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints", keep, group)

    def newest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None when there is none."""
        return max(saved_steps(self.path / "checkpoints"), default=None)

    def check(self) -> None:
        """Errors: ValueError when the folder holds something that is not a run, before anything is written."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.path}")
        others = self.path.is_dir() and any(not entry.name.startswith("gram_teacher.") for entry in self.path.iterdir())
        if others and not self.config.exists():
            raise ValueError(
                f"out: {self.path} is not empty and holds no config.yaml, so it is not a run; "
                "expected a new or empty folder"
            )

    def write_config(self, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.config.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, self.config)


@dataclass
class MetricsLog:
    """Appends one JSON object per line to `metrics.jsonl`, and the same numbers to TensorBoard and Weights & Biases.

    Lines after `start_step`, left by a run that was killed after its last checkpoint, are dropped first; a run that
    begins at step 0 writes all of its lines anew.
    """

    folder: RunFolder
    start_step: int
    tensorboard: bool
    wandb_project: str | None
    _writers: list = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.folder.metrics.exists():
            old = self.folder.metrics.read_text().splitlines() if self.start_step else []
            lines = [line for line in old if _step_of(line) <= self.start_step]
            partial = self.folder.metrics.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in lines))
            os.replace(partial, self.folder.metrics)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and not every run wants it

            self._writers.append(
                _TensorBoard(SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self.start_step + 1))
            )
        if self.wandb_project is not None:
            self._writers.append(_WandB(self.wandb_project, self.folder.path))

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line: {"step": step, **values}."""
        with self.folder.metrics.open("a") as stream:
            stream.write(json.dumps({"step": step} | values) + "\n")
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class _TensorBoard:
    def __init__(self, writer):
        self.writer = writer

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, project: str, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "run.wandb is set but Weights & Biases is not installed: pip install 'dinov3-ext[wandb]'"
            ) from error
        self.run = wandb.init(project=project, dir=str(folder), resume="allow", id=folder.resolve().name)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def _step_of(line: str) -> int:
    """A line cut short by a kill counts as after everything."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62
