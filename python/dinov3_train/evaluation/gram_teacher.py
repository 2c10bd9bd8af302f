"""Which checkpoint of a run is the best Gram teacher, and what is to be said about it: scores, rule, table, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CLEAR = 2.0  # standard errors of the paired difference from which two checkpoints are said to differ
LATE = 0.5  # share of the run's steps after which a Gram teacher counts as late


@dataclass(frozen=True, kw_only=True)
class Score:
    """One checkpoint. quality: (n,), higher is better, of the same n images for all; or (1,) for a single figure.

    step: of the run, 0 for its start; path: of the weights; shown: other measures, for the table.
    """

    step: int
    path: str
    quality: np.ndarray
    shown: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return float(self.quality.mean())


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The Gram teacher, why, and what speaks against it or against refining at all."""

    step: int
    path: str
    reason: str
    warnings: tuple[str, ...]


def choose(scores: Sequence[Score], untrained: Score, *, named: str | None = None) -> Choice:
    """The earliest checkpoint within one standard error of the best, or judgement of the `named` one.

    The errors are those of the difference between two checkpoints on the same images. Early, because later features
    degrade even where the measure does not see it yet: in the paper 100k and 200k steps serve alike, 1M less well.

    Args:
        scores: of at least two checkpoints, in any order.
        untrained: of the weights the run started from.
        named: path of the checkpoint the user chose; None: choose.

    Errors: ValueError for fewer than two scores.
    """
    if len(scores) < 2:
        raise ValueError(f"gram teacher: expected the scores of at least 2 checkpoints, got {len(scores)}")
    ordered = sorted(scores, key=lambda score: score.step)
    best, newest = max(ordered, key=lambda score: score.mean), ordered[-1]
    if named is None:
        chosen = next(score for score in ordered if best.mean - score.mean <= _error(best, score))
        reason = f"step {chosen.step} scores {chosen.mean:.4f}, the best is {best.mean:.4f} at step {best.step}"
        if chosen.step < best.step:
            reason += "; the earliest that does not differ by more than one standard error is taken"
    else:
        chosen = next(score for score in ordered if score.path == named)
        reason = (
            f"step {chosen.step}, as asked, scores {chosen.mean:.4f}; the best is {best.mean:.4f} at step {best.step}"
        )
    return Choice(
        step=chosen.step,
        path=chosen.path,
        reason=reason,
        warnings=_warnings(chosen, best, newest, untrained),
    )


def _warnings(chosen: Score, best: Score, newest: Score, untrained: Score) -> tuple[str, ...]:
    found = []
    if not _clearly_below(newest, best):
        found.append(
            f"the run shows no degradation of its patch features: its newest checkpoint, step {newest.step}, scores "
            f"{newest.mean:.4f} and the best {best.mean:.4f}; refinement may not help"
        )
    elif chosen.step > LATE * newest.step:
        found.append(
            f"the Gram teacher is late, from step {chosen.step} of {newest.step}; what later steps have worn off it "
            "cannot give back"
        )
    if _clearly_below(chosen, best):
        found.append(
            f"the Gram teacher is already degraded: step {chosen.step} scores {chosen.mean:.4f}, step {best.step} "
            f"{best.mean:.4f}"
        )
    if chosen.step > 0 and not _clearly_below(untrained, chosen):
        found.append(
            f"the Gram teacher is no better than untrained weights, {chosen.mean:.4f} and {untrained.mean:.4f}: "
            "the run is too young, or its images tell nothing about places"
        )
    return tuple(found)


def _clearly_below(one: Score, other: Score) -> bool:
    return other.mean - one.mean > CLEAR * _error(one, other)


def _error(one: Score, other: Score) -> float:
    """Standard error of the mean difference over the images; 0 for single figures."""
    difference = one.quality - other.quality
    return float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else 0.0


def table(scores: Sequence[Score], untrained: Score, measure: str, chosen: int) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, the start first, also where it is one of the checkpoints; the chosen step carries an arrow."""
    names = list(untrained.shown)
    rows = []
    ordered = sorted(scores, key=lambda score: score.step)
    for score in ordered if ordered[0].step == 0 else [untrained, *ordered]:
        error = "" if len(score.quality) < 2 else f" \u00b1 {score.quality.std(ddof=1) / len(score.quality) ** 0.5:.4f}"
        mark = " \u2190" if score.step == chosen else ""
        label = "0, the start" if score.step == 0 else str(score.step)
        rows.append([label, f"{score.mean:.4f}{error}{mark}", *(f"{score.shown[name]:.3f}" for name in names)])
    return ["step", measure, *names], rows


def plot(scores: Sequence[Score], untrained: Score, measure: str, choice: Choice, path: Path) -> None:
    """Quality over steps with its standard error, the untrained level and the chosen checkpoint, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ordered = sorted(scores, key=lambda score: score.step)
    steps, means = [score.step for score in ordered], [score.mean for score in ordered]
    errors = [_error(score, untrained) for score in ordered]
    figure = Figure(figsize=(9, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.errorbar(steps, means, errors, color="#0b62b0", marker="o", capsize=3, linewidth=2, label="checkpoints")
    axes.axhline(untrained.mean, color="#626873", linestyle="--", label=f"the start, {untrained.mean:.4f}")
    at = next(score for score in ordered if score.path == choice.path)
    axes.plot(at.step, at.mean, "o", markersize=15, fillstyle="none", markeredgewidth=2.5, color="#c2500a")
    side = {steps[0]: "left", steps[-1]: "right"}.get(at.step, "center")  # stays inside the axes
    above = {"xytext": (0, 12), "textcoords": "offset points", "ha": side, "color": "#c2500a", "weight": "bold"}
    axes.annotate(f"Gram teacher, step {at.step}", (at.step, at.mean + _error(at, untrained)), **above)
    axes.margins(y=0.2)
    axes.set(xlabel="step of the pretraining", ylabel=measure, title="Dense quality of the kept checkpoints")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
