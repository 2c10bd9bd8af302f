"""`dinov3 study gram-teacher`: which earlier checkpoint, at which resolution and weight, should anchor the patches?

One pretraining per seed; from its end every arm trains on with the Gram term of another teacher, resolution and weight,
the first arm without one; where they begin is judged too. Source: arXiv 2508.10104, section 4.2 (teacher iteration x
resolution).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..words import Option
from . import anchoring
from .anchoring import Asked
from .results import Results
from .runner import Arm, Study, run_study

QUESTION = "Which teacher iteration, resolution and weight of Gram anchoring serve dense features best?"


def _whole(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


OPTIONS = anchoring.OPTIONS | {
    "teachers": Option(
        _whole,
        default=(),
        help="steps of the pretraining, 0 the weights it began with; default: a third, two thirds, its end",
    ),
    "resolutions": Option(_numbers, default=(1.0, 2.0), help="Gram crops as multiples of the global crop's side"),
    "weights": Option(_numbers, default=(2.0,), help="of the Gram term"),
}


@dataclass(frozen=True, kw_only=True)
class GramTeacherStudy(Asked):
    """What to compare; `OPTIONS` says what each is."""

    teachers: tuple[int, ...] = ()
    resolutions: tuple[float, ...] = (1.0, 2.0)
    weights: tuple[float, ...] = (2.0,)


def run(
    asked: GramTeacherStudy,
    out: Path,
    *,
    seeds: tuple[int, ...],
    minutes: float | None,
    console: Console | None = None,
) -> Results:
    """Pretrain, anchor, judge; the same call goes on.

    Errors: ValueError for teachers that the pretraining does not pass, resolutions that are no whole patches, and
        whatever the recipe, the sources or the study refuses.
    """
    teachers = asked.teachers or tuple(max(round(asked.steps * part / 3), 1) for part in (1, 2, 3))
    first = anchoring.earliest(asked)
    if min(teachers) < first or max(teachers) > asked.steps or len(set(teachers)) < len(teachers):
        raise ValueError(
            f"study gram-teacher: teachers expects different steps in [{first}, {asked.steps}], got {teachers}"
        )
    if min(asked.resolutions) < 1 or min(asked.weights) <= 0:
        raise ValueError(
            f"study gram-teacher: expected resolutions of at least 1 and weights above 0, got {asked.resolutions} and "
            f"{asked.weights}"
        )
    base = anchoring.pretraining(asked, history_every=anchoring.cadence(teachers, asked.steps))
    arms = [Arm("none", "goes on without a Gram term", _trainer(asked, base, out, lambda _: {}))]
    arms.append(anchoring.start(base, out / "pretraining"))
    for step in teachers:
        for factor in asked.resolutions:
            side = round(factor * base.crops.global_size)
            if side % base.backbone.patch_size:
                raise ValueError(
                    f"study gram-teacher: resolutions expects whole patches of {base.backbone.patch_size} px, "
                    f"{factor:g} x {base.crops.global_size} px is {side}"
                )
            for weight in asked.weights:
                name = f"step{step}-x{factor:g}-w{weight:g}"
                about = f"teacher of step {step} at {side} px, weight {weight:g}"
                arms.append(Arm(name, about, _trainer(asked, base, out, _anchored(step, side, weight))))
    side = anchoring.probe_side(asked, base)
    study = Study("gram-teacher", QUESTION, arms, anchoring.measured(asked, side), _plain(asked))
    return run_study(study, out, seeds=seeds, minutes=minutes, console=console)


def _anchored(step: int, side: int, weight: float) -> Callable[[Path], dict[str, object]]:
    return lambda run: {
        "gram.weight": weight,
        "gram.teacher": anchoring.kept_at(run, step),
        "crops.gram_size": side,
    }


def _trainer(asked: Asked, base, out: Path, changes: Callable[[Path], dict[str, object]]):
    return anchoring.trainer(base, out / "pretraining", changes, asked.more)


def _plain(asked: GramTeacherStudy) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(asked).items()}
