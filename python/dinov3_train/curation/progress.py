"""Progress of the stages of curation: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS = 10.0  # between lines where there is no terminal


@dataclass
class StageProgress:
    """What a stage is told to report to; `name` is the stage."""

    name: str
    console: Console
    _bar: Progress | None = field(default=None, init=False)
    _task: TaskID | None = field(default=None, init=False)
    _began: float = field(default_factory=time.monotonic, init=False)
    _said: float = field(default_factory=time.monotonic, init=False)
    _last: int = field(default=0, init=False)

    def __enter__(self) -> StageProgress:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=None)
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` of the pass that is under way; a smaller `done` than before begins another pass."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if done < self._last:
            self._began = now
        self._last = done
        if now - self._said > SECONDS and done:
            left = int((now - self._began) / done * (total - done))
            self.say(f"{100 * done // max(1, total)} %, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
            self._said = now

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True)
