"""Choosing the Gram teacher: each kept checkpoint of a run is scored; the run folder explains the choice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from .config import Config
from .data.sources import Source, open_source
from .evaluation import health
from .evaluation.correspondence import Pairs, correspondence, make_pairs, pair_features
from .evaluation.gram_teacher import Choice, Score, choose, plot, table
from .evaluation.panel import open_panel
from .evaluation.segment import evaluate_segment
from .train.checkpoint import saved_steps
from .train.distributed import Ranks, barrier
from .train.run_folder import RunFolder
from .weights import Resolved, resolve

IMAGES = 48  # of the training images, spread evenly; the standard error is then about a hundredth
MEASURE = "patches found again"


def choose_teacher(
    config: Config, run: Path, out: Path, teacher: str, *, labelled: str | None, here: Ranks, console: Console
) -> str:
    """What `gram.teacher` is to be: the first rank scores, explains and writes `gram_teacher.json`, all ranks read it.

    Args:
        config: of the refinement; its images and Gram crop decide how checkpoints are looked at.
        run: the pretraining whose kept checkpoints are scored.
        out: run folder of the refinement.
        teacher: "auto", "ema", or weights; weights of `run` are judged against its other checkpoints, others are not.
        labelled: images with masks, for the score; None: without labels.
        here: the ranks; console: of the first rank.

    Errors: ValueError under "auto" when fewer than two checkpoints are kept.
    """
    if teacher == "ema":
        return teacher
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    kept = kept_weights(run)
    named = None if teacher == "auto" else pinned(teacher)
    if named is not None and (named not in kept.values() or len(kept) < 2):
        return named
    if len(kept) < 2:
        raise ValueError(
            f"teacher=auto: {run} kept {len(kept)} checkpoint{'s'[: len(kept) != 1]}, expected at least 2 to choose "
            "from (run.history_every keeps a thin history while pretraining); or name one: teacher=RUN|FILE|ema"
        )
    record = out / "gram_teacher.json"
    barrier()  # every rank has looked at the folder, which must be new, empty or this run's
    if here.first:
        choice, scores, untrained, measure = score_run(config, run, kept, named=named, labelled=labelled, here=here)
        out.mkdir(parents=True, exist_ok=True)
        _explain(choice, scores, untrained, measure, out=out, console=console)
        entry = {
            "teacher": choice.path,
            "step": choice.step,
            "measure": measure,
            "reason": choice.reason,
            "warnings": choice.warnings,
            "scores": [{"step": s.step, "quality": s.mean, **s.shown} for s in [untrained, *scores]],
        }
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(entry, indent=1) + "\n")
        os.replace(partial, record)
    barrier()
    return json.loads(record.read_text())["teacher"]


def kept_weights(run: Path) -> dict[int, str]:
    """Path of the teacher's weights by step, from the thin history and the checkpoints, history first."""
    folder = RunFolder(run)
    checkpoints = {step: str(folder.checkpoints().path(step)) for step in saved_steps(run / "checkpoints")}
    return checkpoints | {step: str(folder.history_file(step)) for step in folder.history_steps()}


def pinned(teacher: str) -> str:
    """Weights as they are now: of a run folder its newest checkpoint, as the run may train on."""
    steps = saved_steps(Path(teacher) / "checkpoints")
    if not steps:
        return teacher
    return kept_weights(Path(teacher)).get(steps[-1], teacher)


def score_run(
    config: Config, run: Path, kept: dict[int, str], *, named: str | None, labelled: str | None, here: Ranks
) -> tuple[Choice, list[Score], Score, str]:
    """The choice, the scores of the kept checkpoints and of the untrained start, and what was measured."""
    found = resolve(run, step=0)
    if labelled is not None:
        return _score_labelled(found, run, kept, named=named, labelled=labelled, here=here)
    side = config.crops.gram_size or config.crops.global_size
    source = open_source(list(config.data.sources))
    panel = open_panel(source, found.view(side), images=min(IMAGES, len(source)), patch_size=found.backbone.patch_size)
    pairs = make_pairs(panel)

    def score(step: int, path: str, backbone: nn.Module) -> Score:
        return _score(step, path, backbone.to(here.device), pairs)

    return _scored(score, found, run, kept, named=named, measure=MEASURE)


def _scored(
    score: Callable[[int, str, nn.Module], Score],
    found: Resolved,
    run: Path,
    kept: dict[int, str],
    *,
    named: str | None,
    measure: str,
) -> tuple[Choice, list[Score], Score, str]:
    """What `score_run` returns; a start that was kept is looked at once."""
    scores = [score(step, path, resolve(path).backbone) for step, path in sorted(kept.items())]
    untrained = scores[0] if 0 in kept else score(0, f"{run}, untrained", found.backbone)
    return choose(scores, untrained, named=named), scores, untrained, measure


def _score_labelled(
    found: Resolved, run: Path, kept: dict[int, str], *, named: str | None, labelled: str, here: Ranks
) -> tuple[Choice, list[Score], Score, str]:
    """As `score_run`, by the mIoU of a linear probe: trained on every other image of `labelled`, judged on the rest."""
    source, seen_as = open_source(labelled), found.view()
    halves = [_EveryOther(source, first) for first in (0, 1)]

    def score(step: int, path: str, backbone: nn.Module) -> Score:
        result = evaluate_segment(backbone.to(here.device), *halves, seen_as)
        return Score(step=step, path=path, quality=np.array([result.miou]))

    return _scored(score, found, run, kept, named=named, measure=f"mIoU on {Path(labelled).name}")


class _EveryOther(Source):
    """Images `first`, `first` + 2, ... of a source."""

    def __init__(self, source: Source, first: int) -> None:
        self.classes = source.classes
        self._source, self._numbers = source, range(first, len(source), 2)

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        return self._source.name(self._numbers[index])

    def read(self, index: int) -> bytes | Image.Image:
        return self._source.read(self._numbers[index])

    def read_extra(self, index: int, suffix: str) -> bytes | None:
        return self._source.read_extra(self._numbers[index], suffix)


def _score(step: int, path: str, backbone: nn.Module, pairs: Pairs) -> Score:
    first, second = pair_features(backbone, pairs)
    return Score(
        step=step,
        path=path,
        quality=correspondence(first, second, pairs).double().numpy(),
        shown={"locality": health.locality(first), "patch similarity": health.patch_similarity(first)},
    )


def _explain(
    choice: Choice, scores: list[Score], untrained: Score, measure: str, *, out: Path, console: Console
) -> None:
    headings, rows = table(scores, untrained, measure, choice.step)
    shown = Table(title="Gram teacher: dense quality of the kept checkpoints", title_justify="left")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    plot(scores, untrained, measure, choice, out / "gram_teacher.png")
    console.print(f"Gram teacher: {choice.reason}; plot: {out / 'gram_teacher.png'}", highlight=False, soft_wrap=True)
    for warning in choice.warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
