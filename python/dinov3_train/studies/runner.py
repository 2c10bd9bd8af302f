"""Runs the arms of a study on several seeds within a budget; what is finished is kept, the same call goes on.

A study's folder holds study.json (what was asked), runs/ARM-seedN, scores/ARM-seedN.json, and the results:
results.json, results.csv, table.md, plot.png.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from .results import Results, Score


@dataclass(frozen=True)
class Arm:
    """One way to train. train(seed, folder, minutes, console) trains in `folder`, or goes on there, for at most so many
    minutes (None: as long as it takes); whether it is finished is returned."""

    name: str
    about: str
    train: Callable[[int, Path, float | None, Console], bool]


@dataclass(frozen=True)
class Study:
    """A question, the arms that answer it (the first is what others are compared with), and how a run is judged.

    measure(folder, seed) gives scores by name; the first is the one that is plotted. settings: whatever decides the
    result, as JSON; a folder that was begun with others is refused.
    """

    name: str
    question: str
    arms: Sequence[Arm]
    measure: Callable[[Path, int], Mapping[str, Score]]
    settings: Mapping = field(default_factory=dict)


def run_study(
    study: Study, out: Path, *, seeds: Sequence[int], minutes: float | None = None, console: Console | None = None
) -> Results:
    """Train and judge every arm with every seed, all arms of a seed before the next seed.

    Args:
        out: new, empty, or of this very study.
        seeds: of the training.
        minutes: wall-clock of this call, all arms together; the run under way when it ends is continued by the next
            call. None: no limit.

    Returns what is finished by then; it is written into `out` after every run.
    Errors: ValueError for no seeds, a budget that is not positive, arms of one name, another study's folder.
    """
    console = console or Console()
    begin(study, out, seeds=seeds, minutes=minutes)
    end = None if minutes is None else time.monotonic() + 60.0 * minutes
    jobs = [(arm, seed) for seed in seeds for arm in study.arms]
    for number, (arm, seed) in enumerate(jobs, start=1):
        if _scores_file(out, arm, seed).is_file():
            continue
        left = None if end is None else (end - time.monotonic()) / 60.0
        if left is not None and left <= 0:
            console.print(f"the budget is spent; {_missing(out, jobs)} runs are left, the same command goes on")
            break
        console.print(f"[{number}/{len(jobs)}] {arm.name}, seed {seed}: {arm.about}", markup=False, soft_wrap=True)
        folder = out / "runs" / f"{arm.name}-seed{seed}"
        if not arm.train(seed, folder, left, console):
            left_over = f"{_missing(out, jobs)} runs are left, the same command goes on"
            console.print(f"{arm.name}, seed {seed} is not finished; {left_over}", soft_wrap=True)
            break
        scores = study.measure(folder, seed)
        _write_scores(_scores_file(out, arm, seed), scores)
        console.print("  " + ", ".join(f"{name} {score.value:.4f}" for name, score in scores.items()))
        _results(study, out, seeds).write(out)
    results = _results(study, out, seeds)
    if results.rows:
        results.write(out)
    return results


def _check(study: Study, seeds: Sequence[int], minutes: float | None) -> None:
    names = [arm.name for arm in study.arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"study: expected arms of different names, got {names}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"study: seeds expects different numbers, got {list(seeds)}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"study: minutes expects a number above 0, got {minutes}")


def begin(study: Study, out: Path, *, seeds: Sequence[int], minutes: float | None = None) -> None:
    """Write what is asked into a new folder, or compare it with what is there; `run_study` does it, and a study that
    prepares something in its folder before the runs. Errors: those of `run_study`.
    """
    _check(study, seeds, minutes)
    path = out / "study.json"
    wanted = json.loads(json.dumps({"study": study.name, "arms": [a.name for a in study.arms], **study.settings}))
    if path.is_file():
        found = json.loads(path.read_text())
        differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        if differing:
            said = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} asked" for key in differing[:3])
            raise ValueError(f"study: out={out} was begun with other settings ({said}); choose another out=")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"study: out={out} is not empty and holds no study; expected a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(path, wanted)


def _scores_file(out: Path, arm: Arm, seed: int) -> Path:
    return out / "scores" / f"{arm.name}-seed{seed}.json"


def _write_scores(path: Path, scores: Mapping[str, Score]) -> None:
    _write_json(path, {name: asdict(score) for name, score in scores.items()})


def _write_json(path: Path, values: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values) + "\n")
    os.replace(partial, path)


def _missing(out: Path, jobs: Sequence[tuple[Arm, int]]) -> int:
    return sum(not _scores_file(out, arm, seed).is_file() for arm, seed in jobs)


def _results(study: Study, out: Path, seeds: Sequence[int]) -> Results:
    """The scores that are there, of the seeds that were asked for."""
    rows = {}
    for arm in study.arms:
        for seed in seeds:
            path = _scores_file(out, arm, seed)
            if path.is_file():
                read = json.loads(path.read_text())
                rows[arm.name, seed] = {name: Score(**values) for name, values in read.items()}
    return Results(study.name, study.question, tuple(arm.name for arm in study.arms), rows, dict(study.settings))
