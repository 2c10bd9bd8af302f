"""Live progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass
class ProgressLine:
    """Shows step, images/s, time left, loss and learning rate."""

    total: int
    start_step: int
    console: Console
    seconds_limit: float | None = None
    _bar: Progress | None = field(default=None, init=False)
    _began: float = field(default_factory=time.monotonic, init=False)

    def __enter__(self) -> ProgressLine:
        if self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("train", total=self.total, completed=self.start_step, text="")
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        """Advance the bar to `step` steps done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def values(self, step: int, values: dict[str, float], label: str = "") -> None:
        """Show the numbers logged at `step`; `label` says whose, where several are trained."""
        names = [name for name in ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram") if name in values]
        losses = "  ".join(f"{name} {values[name]:.3f}" for name in names)
        speed = f"{label}  " * bool(label) + f"{values['images_per_second']:.1f} images/s"
        text = f"{speed}  {losses}  lr {values['learning_rate']:.2e}{_epochs(values)}"
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        else:
            self.console.print(
                f"step {step}/{self.total}  {self._left(step)} left  {text}", highlight=False, soft_wrap=True
            )

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        elapsed, done = time.monotonic() - self._began, step - self.start_step
        seconds = elapsed / max(done, 1) * (self.total - step)
        if self.seconds_limit is not None:
            seconds = min(seconds, self.seconds_limit - elapsed)
        minutes, seconds = divmod(max(int(seconds), 0), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _epochs(values: dict[str, float]) -> str:
    """Epochs done, of the pool or of each source."""
    sources = {key.partition("/")[2]: epochs for key, epochs in values.items() if key.startswith("epochs/")}
    if sources:
        return "  epochs " + ", ".join(f"{name} {epochs:.2f}" for name, epochs in sources.items())
    return f"  epoch {values['epochs']:.2f}" if "epochs" in values else ""
