"""`dinov3 study dense-regularizers`: does something simpler than Gram anchoring keep dense features?

From the end of one pretraining per seed every arm trains the same number of steps: without anything, with Gram
anchoring to an early teacher, KoLeo among patches, a stronger iBOT term, or that teacher's features themselves. The arm
with an auxiliary dense head has it from the beginning, so it pretrains for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..config import replaced
from ..words import Option
from . import anchoring
from .anchoring import Asked
from .results import Results
from .runner import Arm, Study, run_study

QUESTION = "Does a simpler regulariser keep dense features as Gram anchoring does?"

OPTIONS = anchoring.OPTIONS | {
    "teacher": Option(
        int, help="step of the early teacher, 0 the weights it began with; default: a third of the pretraining"
    ),
    "gram": Option(float, default=2.0, help="weight of the Gram term"),
    "koleo_patches": Option(float, default=0.1, help="weight of KoLeo among patches"),
    "ibot": Option(float, default=2.0, help="factor of the iBOT weight"),
    "dense": Option(float, default=1.0, help="weight of the auxiliary dense head"),
    "features": Option(float, default=1.0, help="weight of the distance to the early teacher's features"),
}


@dataclass(frozen=True, kw_only=True)
class DenseRegularizerStudy(Asked):
    """What to compare; `OPTIONS` says what each is."""

    teacher: int | None = None
    gram: float = 2.0
    koleo_patches: float = 0.1
    ibot: float = 2.0
    dense: float = 1.0
    features: float = 1.0


def run(
    asked: DenseRegularizerStudy,
    out: Path,
    *,
    seeds: tuple[int, ...],
    minutes: float | None,
    console: Console | None = None,
) -> Results:
    """Pretrain, go on with each regulariser, judge; the same call goes on.

    Errors: ValueError for a teacher that the pretraining does not pass, weights that are not above 0, and whatever the
        recipe, the sources or the study refuses.
    """
    step = asked.teacher if asked.teacher is not None else max(asked.steps // 3, 1)
    first = anchoring.earliest(asked)
    if not first <= step <= asked.steps:
        raise ValueError(f"study dense-regularizers: teacher expects a step in [{first}, {asked.steps}], got {step}")
    for name in ("gram", "koleo_patches", "ibot", "dense", "features"):
        if getattr(asked, name) <= 0:
            raise ValueError(f"study dense-regularizers: {name} expects a weight above 0, got {getattr(asked, name):g}")
    base = anchoring.pretraining(asked, history_every=anchoring.cadence((step,), asked.steps))
    dense = replaced(base, {"losses.dense": asked.dense})
    ibot = asked.ibot * base.losses.ibot

    def early(changes: dict[str, object]) -> Callable[[Path], dict[str, object]]:
        return lambda run: {"gram.teacher": anchoring.kept_at(run, step)} | changes

    def train(changes: Callable[[Path], dict[str, object]]):
        return anchoring.trainer(base, out / "pretraining", changes, asked.more)

    arms = [
        Arm("none", "goes on as it was", train(lambda _: {})),
        anchoring.start(base, out / "pretraining"),
        Arm("gram", f"Gram anchoring to step {step}, weight {asked.gram:g}", train(early({"gram.weight": asked.gram}))),
        Arm(
            "koleo-patches",
            f"KoLeo among patches, weight {asked.koleo_patches:g}",
            train(lambda _: {"losses.koleo_patches": asked.koleo_patches}),
        ),
        Arm("ibot", f"iBOT weight {ibot:g}", train(lambda _: {"losses.ibot": ibot})),
        Arm(
            "dense-head",
            f"a dense head from the beginning, weight {asked.dense:g}",
            anchoring.trainer(dense, out / "pretraining-dense", lambda _: {}, asked.more),
        ),
        Arm(
            "features",
            f"features of step {step} themselves, weight {asked.features:g}",
            train(early({"gram.features": asked.features})),
        ),
    ]
    side = anchoring.probe_side(asked, base)
    study = Study("dense-regularizers", QUESTION, arms, anchoring.measured(asked, side), _plain(asked))
    return run_study(study, out, seeds=seeds, minutes=minutes, console=console)


def _plain(asked: DenseRegularizerStudy) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(asked).items()}
