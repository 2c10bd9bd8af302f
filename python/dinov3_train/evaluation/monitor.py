"""Looking at a panel while a run trains: measures, signs of degradation, and the features kept for comparison."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3_train.evaluation.panel import Panel, measures, panel_features
from dinov3_train.evaluation.signatures import Sign, signs

PREFIX = "health/"  # of the keys in metrics.jsonl and TensorBoard


@dataclass
class Monitor:
    """The looks of one run; all it knows of earlier ones comes from the run folder, so a resumed run sees the same.

    panel: the images.
    folder: `RUN/health`: the panel's patches (fp16) at the start and at the last looks, one file per look.
    history: rows of the run's earlier looks, oldest first, as `history_of` gives them.
    settled: step up to which nothing is judged.
    temperature: of the softmax over prototypes.
    oldest_resume: gives the oldest step the run could be continued from; looks before it are not kept.
    """

    panel: Panel
    folder: Path
    history: list[dict[str, float]]
    settled: int
    temperature: float
    oldest_resume: Callable[[], int]

    def __post_init__(self) -> None:
        steps = self._steps()
        if steps and self._kept(steps[-1]) is None:
            self.history.clear()  # another panel: its measures cannot be compared with these

    def look(
        self, step: int, backbone: nn.Module, heads: Mapping[str, nn.Module]
    ) -> tuple[dict[str, float], list[Sign]]:
        """The measures at `step`, with "seconds" they took, and the signs that were not there at the look before."""
        began = time.monotonic()
        features = panel_features(backbone, self.panel)
        start, previous = self._kept(0), self._kept(max((s for s in self._steps() if s < step), default=None))
        if step == 0:
            start = None  # a distance to itself
        row = measures(features, heads=heads, temperature=self.temperature, start=start, previous=previous)
        self._keep(step, features.patches)
        standing = {sign.name for sign in signs(self.history, settled=self.settled)}
        self.history.append({"step": step, **row})
        appeared = [sign for sign in signs(self.history, settled=self.settled) if sign.name not in standing]
        return row | {"seconds": time.monotonic() - began}, appeared

    def _steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("step_")) for path in self.folder.glob("step_*.safetensors"))

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.safetensors"

    def _kept(self, step: int | None) -> Tensor | None:
        if step is None or not self._path(step).is_file():
            return None
        with safe_open(self._path(step), "pt") as file:
            same = (file.metadata() or {}).get("panel") == self.panel.digest
            return file.get_tensor("patches").float() if same else None

    def _keep(self, step: int, patches: Tensor) -> None:
        """Write this look; the start, the newest before the oldest checkpoint and all later ones stay beside it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".step_{step:08d}.partial"
        save_file({"patches": patches.to(torch.float16).contiguous()}, partial, {"panel": self.panel.digest})
        os.replace(partial, self._path(step))
        before = [other for other in self._steps() if other <= self.oldest_resume()]
        for other in before[:-1]:
            if other != 0:
                self._path(other).unlink()


def history_of(rows: Sequence[Mapping[str, object]], until: int | None = None) -> list[dict[str, float]]:
    """Rows of measures from the lines of a run's metrics.jsonl, without their prefix, up to step `until`."""
    found = []
    for row in rows:
        values = {key.removeprefix(PREFIX): value for key, value in row.items() if key.startswith(PREFIX)}
        if values and (until is None or row["step"] <= until):
            found.append({"step": row["step"], **values})
    return found
