"""The loop of a distillation: one batch, one pass of the teacher, one `train_step` of every student of this rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from ..config import Run
from ..data.batch import CropBatch, normalize
from ..train.checkpoint import save_history
from ..train.distributed import Ranks, any_rank
from ..train.loop import Clock, Watchers, evaluate_step, log_step, monitor_step, stop_signals
from ..train.progress import ProgressLine
from ..train.run_folder import MetricsLog, RunFolder
from ..train.step import StepSettings, StepValues, TrainState, train_step
from .exchange import exchanged
from .teacher import FrozenTeacher


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student in training, and the run folder it is written to."""

    name: str
    state: TrainState
    settings: StepSettings
    values_at: Callable[[int], StepValues]
    run: Run
    folder: RunFolder
    watchers: Watchers
    config_yaml: str


def fit_students(
    students: Sequence[Student],
    batches: Iterator[CropBatch],
    teacher: FrozenTeacher,
    *,
    run: Run,
    world: Ranks,
    group: Ranks,
    progress: ProgressLine,
) -> str:
    """Train until `run.steps`, `run.minutes` or a signal; the reason is returned, the same on every rank.

    Args:
        students: of this rank's group, all at the same step.
        batches: this rank's slice of every micro-batch of the world.
        teacher: of all.
        run: of all; the students' own differ in nothing the loop reads.
        world, group: all ranks, and those that train these students. Where they differ, slices are exchanged.
        progress: lines and bar.
    """
    logs = [
        MetricsLog(each.folder, each.state.step, run.tensorboard, run.wandb) if group.first else None
        for each in students
    ]
    began = time.monotonic()
    clocks = [Clock(began=began, last=began) for _ in students]
    step = saved = students[0].state.step
    reason = "steps"
    with stop_signals() as stop:
        while step < run.steps:
            asked = time.monotonic()
            micro_batches = list(islice(batches, run.accumulate))
            waited = time.monotonic() - asked
            for batch in micro_batches:
                students[0].watchers.unreadable(batch.skipped)
            teacher.forget()
            if group.world_size < world.world_size:
                micro_batches = [
                    _share(batch, teacher, students[0].settings, world=world, group=group) for batch in micro_batches
                ]
            for student, log, clock in zip(students, logs, clocks):
                clock.waiting += waited
                _step(student, micro_batches, log, clock, group, progress, label=student.name)
            step += 1
            progress.step(step)
            late = run.minutes is not None and time.monotonic() - began >= 60.0 * run.minutes
            stopping, late = any_rank((stop.is_set(), late), world.collectives, world.device)
            if step % run.checkpoint_every == 0 or stopping or late:
                _save(students, group)
                saved = step
            if stopping or late:
                reason = "signal" if stopping else "minutes"
                break
    if saved != step:
        _save(students, group)
    for log in logs:
        if log is not None:
            log.close()
    return reason


def _step(
    student: Student,
    micro_batches: list[CropBatch],
    log: MetricsLog | None,
    clock: Clock,
    group: Ranks,
    progress: ProgressLine,
    *,
    label: str,
) -> None:
    """One step of one student, and what is written and looked at after it."""
    state, run, watchers = student.state, student.run, student.watchers
    values = student.values_at(state.step)
    report = train_step(state, micro_batches, values, student.settings)
    clock.steps += 1
    if not report.finite:
        progress.say(f"{label}, step {state.step - 1}: not finite, step skipped ({state.skipped} in a row)")
    seen = {"ranks": group, "log": log, "clock": clock, "progress": progress}
    if state.step % run.log_every == 0 or state.step == run.steps:
        drawn = watchers.drawn(state.step) if watchers.drawn is not None and group.first else {}
        log_step(state, report, values, drawn, run=run, label=label, **seen)
    if run.evaluate_every and state.step % run.evaluate_every == 0 and watchers.evaluate is not None:
        evaluate_step(state, watchers.evaluate, **seen)
    if watchers.monitor_every and (state.step % watchers.monitor_every == 0 or state.step == run.steps):
        monitor_step(state, watchers.monitor, **seen)
    if run.history_every and state.step % run.history_every == 0 and group.first:
        save_history(student.folder.history, state)


def _share(
    host_batch: CropBatch, teacher: FrozenTeacher, settings: StepSettings, *, world: Ranks, group: Ranks
) -> CropBatch:
    """The group's share of a micro-batch: the teacher sees this rank's slice, then all ranks exchange."""
    batch = host_batch.to(world.device)
    crops = normalize(batch.global_crops, settings.mean, settings.std)
    with torch.autocast(world.device.type, settings.autocast, enabled=settings.autocast is not None):
        found = teacher.bottlenecks(batch, crops)
    images = batch.masks.shape[1] * world.world_size // group.world_size
    share = range(group.rank * images, (group.rank + 1) * images)
    shared, found = exchanged(batch, found, world.collectives, share)
    teacher.remember(shared, found)
    return shared


def _save(students: Sequence[Student], group: Ranks) -> None:
    for student in students:
        student.folder.checkpoints(student.run.keep, group.group).save(student.state, student.config_yaml)
