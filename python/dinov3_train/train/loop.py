"""The loop around `train_step`: batches in, metrics and checkpoints out, until the last step, a limit or a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from ..config import Run
from ..data.batch import CropBatch
from .checkpoint import save_history
from .distributed import Ranks, any_rank, barrier
from .progress import ProgressLine
from .run_folder import MetricsLog, RunFolder
from .step import StepReport, StepSettings, StepValues, TrainState, train_step


@dataclass(frozen=True, kw_only=True)
class Watchers:
    """What looks on while a run trains: counts of unreadable and drawn images, evaluation and health of the teacher.

    `evaluate` and `monitor` are called on the first rank only; `monitor` gives values to log and warnings to say, at
    step 0, every `monitor_every` steps and at the last step.
    """

    unreadable: Callable[[tuple[str, ...]], None]  # names a batch had to skip; raises when there are too many
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    drawn: Callable[[int], dict[str, float]] | None = None  # after so many steps: images and epochs of each source
    monitor: Callable[[TrainState], tuple[dict[str, float], list[str]]] | None = None
    monitor_every: int = 0
    drift: Callable[[TrainState], dict[str, float]] | None = None  # from the initial weights; first rank only


@dataclass
class Clock:
    """Seconds since the last log, in all and waiting for data."""

    began: float
    last: float
    waiting: float = 0.0
    steps: int = 0

    def lap(self, now: float, images_per_step: int) -> dict[str, float]:
        elapsed = max(now - self.last, 1e-9)
        lap = {
            "images_per_second": self.steps * images_per_step / elapsed,
            "data_wait": self.waiting / elapsed,
            "seconds": now - self.began,
        }
        self.last, self.waiting, self.steps = now, 0.0, 0
        return lap


def fit(
    state: TrainState,
    batches: Iterator[CropBatch],
    values_at: Callable[[int], StepValues],
    *,
    settings: StepSettings,
    run: Run,
    folder: RunFolder,
    watchers: Watchers,
    ranks: Ranks,
    config_yaml: str,
    progress: ProgressLine,
) -> str:
    """Train until `run.steps`, `run.minutes` or a signal; the reason is returned: "steps", "minutes" or "signal".

    A checkpoint is written every `run.checkpoint_every` steps and at the end, whatever ended it.
    """
    checkpoints = folder.checkpoints(run.keep)
    log = MetricsLog(folder, state.step, run.tensorboard, run.wandb) if ranks.first else None
    clock = Clock(began=time.monotonic(), last=time.monotonic())
    reason, saved = "steps", state.step
    with stop_signals() as stop:
        if watchers.monitor_every and state.step == 0:
            monitor_step(state, watchers.monitor, ranks=ranks, log=log, clock=clock, progress=progress)
        while state.step < run.steps:
            asked = time.monotonic()
            micro_batches = list(islice(batches, run.accumulate))
            clock.waiting += time.monotonic() - asked
            for batch in micro_batches:
                watchers.unreadable(batch.skipped)
            values = values_at(state.step)
            report = train_step(state, micro_batches, values, settings)
            clock.steps += 1
            progress.step(state.step)
            if not report.finite:
                progress.say(
                    f"step {state.step - 1}: loss or gradient not finite, step skipped ({state.skipped} in a row)"
                )
            if state.step % run.log_every == 0 or state.step == run.steps:
                drawn = watchers.drawn(state.step) if watchers.drawn is not None and ranks.first else {}
                log_step(state, report, values, drawn, ranks=ranks, log=log, clock=clock, run=run, progress=progress)
            if run.evaluate_every and state.step % run.evaluate_every == 0:
                evaluate_step(state, watchers.evaluate, ranks=ranks, log=log, clock=clock, progress=progress)
            due = watchers.monitor_every and (state.step % watchers.monitor_every == 0 or state.step == run.steps)
            if due:
                monitor_step(state, watchers.monitor, ranks=ranks, log=log, clock=clock, progress=progress)
            if run.drift_every and state.step % run.drift_every == 0:
                evaluate_step(state, watchers.drift, ranks=ranks, log=log, clock=clock, progress=progress)
            if run.history_every and state.step % run.history_every == 0 and ranks.first:
                save_history(folder.history, state)
            late = run.minutes is not None and time.monotonic() - clock.began >= 60.0 * run.minutes
            stopping, late = any_rank((stop.is_set(), late), settings.collectives, ranks.device)
            if state.step % run.checkpoint_every == 0 or stopping or late:
                checkpoints.save(state, config_yaml)
                saved = state.step
            if stopping or late:
                reason = "signal" if stopping else "minutes"
                break
    if saved != state.step:
        checkpoints.save(state, config_yaml)
    if log is not None:
        log.close()
    return reason


def log_step(
    state: TrainState,
    report: StepReport,
    values: StepValues,
    drawn: dict[str, float],
    *,
    ranks: Ranks,
    log: MetricsLog | None,
    clock: Clock,
    run: Run,
    progress: ProgressLine,
    label: str = "",
) -> None:
    """Write and show the numbers of a step; `label` names the student where there are several."""
    losses = torch.stack(list(report.losses.values()))
    losses = (ranks.collectives.all_reduce(losses, "sum") / ranks.world_size).tolist()
    if log is None:
        return
    line = dict(zip(report.losses, losses))
    line |= {f"gradient_norm/{name}": float(norm) for name, norm in report.gradient_norms.items()}
    line |= {
        "learning_rate": values.learning_rate,
        "weight_decay": values.weight_decay,
        "momentum": values.momentum,
        "teacher_temperature": values.teacher_temperature,
        "images": state.images,
    }
    line |= drawn
    line |= clock.lap(time.monotonic(), run.batch_size)
    log.write(state.step, line)
    progress.values(state.step, line, label)


def evaluate_step(
    state: TrainState,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    *,
    ranks: Ranks,
    log: MetricsLog | None,
    clock: Clock,
    progress: ProgressLine,
) -> None:
    """Write and show what an evaluation of the teacher gives, on the first rank; the others wait."""
    began = time.monotonic()
    if log is not None and evaluate is not None:
        scores = evaluate(state)
        log.write(state.step, scores | {"seconds": time.monotonic() - clock.began})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        progress.say(f"step {state.step}: {shown}")
    barrier(ranks.group)
    clock.last += time.monotonic() - began  # evaluation is not part of the training speed


def monitor_step(
    state: TrainState,
    monitor: Callable[[TrainState], tuple[dict[str, float], list[str]]] | None,
    *,
    ranks: Ranks,
    log: MetricsLog | None,
    clock: Clock,
    progress: ProgressLine,
) -> None:
    """Write the health monitor's values and say its warnings, on the first rank; the others wait."""
    began = time.monotonic()
    if log is not None and monitor is not None:
        values, warnings = monitor(state)
        log.write(state.step, values | {"seconds": time.monotonic() - clock.began})
        for warning in warnings:
            progress.say(f"health, {warning}")
    barrier(ranks.group)
    clock.last += time.monotonic() - began  # nor is this


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that the step under way is finished and saved."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
