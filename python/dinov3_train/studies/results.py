"""Scores of a study's runs, their intervals, and the table and plot made of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

import numpy as np

RESAMPLES = 2000
FEWEST_SEEDS = 3  # from here on intervals are those of seeds
LEVEL = 0.95
BOUNDS, APART = ("mean", "low", "high"), ("difference", "difference_low", "difference_high")


@dataclass(frozen=True)
class Score:
    """One number of one run. What it was computed from gives its interval; without, it is a number alone:

    items, groups (n,): the mean over groups of the mean of their items, such as 1 for a test image that was classified
        rightly; groups: such as its class;
    parts, wholes (n, C): the mean over C of sum parts / sum wholes, both over n, such as intersections and unions of C
        classes in n images; a class whose wholes are all zero is left out.

    Two runs are judged on the same items in the same order.
    """

    value: float
    items: list[float] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)
    wholes: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.items) != len(self.groups):
            raise ValueError(f"Score: expected a group for each item, got {len(self.items)} and {len(self.groups)}")
        if len(self.parts) != len(self.wholes):
            raise ValueError(f"Score: expected a whole for each part, got {len(self.parts)} and {len(self.wholes)}")


def grouped_score(items: Sequence[float], groups: Sequence[int]) -> Score:
    """The score whose value is the mean over groups of the mean of their items."""
    values, labels = np.asarray(items, dtype=np.float64), np.asarray(groups)
    if not len(values):
        raise ValueError("Score: expected at least one item, got none")
    means = [values[labels == group].mean() for group in np.unique(labels)]
    return Score(float(np.mean(means)), [float(v) for v in values], [int(g) for g in labels])


def ratio_score(parts: np.ndarray, wholes: np.ndarray) -> Score:
    """The score whose value is the mean over C of sum parts / sum wholes, both (n, C)."""
    parts, wholes = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    value = _mean_ratio(parts.sum(axis=0), wholes.sum(axis=0))
    return Score(float(value), parts=parts.tolist(), wholes=wholes.tolist())


def _mean_ratio(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """(...,) from sums (..., C)."""
    there = wholes > 0
    ratios = np.divide(parts, wholes, out=np.zeros_like(parts), where=there)
    return ratios.sum(axis=-1) / there.sum(axis=-1)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; kind: "seeds" (Student's t), "items" (bootstrap) or "" where there is none."""

    mean: float
    low: float | None
    high: float | None
    kind: str


def interval(scores: Sequence[Score]) -> Interval:
    """Of runs that differ in the seed: over seeds from three on; of fewer, over the items they were judged on."""
    values = [score.value for score in scores]
    if len(scores) >= FEWEST_SEEDS:
        return _over_seeds(values)
    return _over_items(values, _resampled(scores) if _alike(scores) else None)


def difference(scores: Sequence[Score], others: Sequence[Score]) -> Interval:
    """Interval of scores minus others, run by run: of one seed, or of the same items."""
    if len(scores) != len(others):
        raise ValueError(f"difference: expected as many runs of both, got {len(scores)} and {len(others)}")
    values = [one.value - other.value for one, other in zip(scores, others)]
    if len(scores) >= FEWEST_SEEDS:
        return _over_seeds(values)
    alike = _alike([*scores, *others])
    return _over_items(values, _resampled(scores) - _resampled(others) if alike else None)  # of the same draws


def _over_seeds(values: Sequence[float]) -> Interval:
    from scipy.stats import t  # comes with scikit-learn

    mean, half = float(np.mean(values)), 0.0
    if len(values) > 1:
        half = float(t.ppf(0.5 + LEVEL / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half, "seeds")


def _over_items(values: Sequence[float], resampled: np.ndarray | None) -> Interval:
    """Percentiles of the bootstrap; it knows nothing of other seeds."""
    if resampled is None:
        return Interval(float(np.mean(values)), None, None, "")
    low, high = np.quantile(resampled, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(float(np.mean(values)), float(low), float(high), "items")


def _alike(scores: Sequence[Score]) -> bool:
    """Whether they are of the same items; false for numbers alone."""
    first = scores[0]
    judged = bool(first.items or first.wholes)
    return judged and all(
        score.groups == first.groups and np.shape(score.wholes) == np.shape(first.wholes) for score in scores
    )


def _resampled(scores: Sequence[Score]) -> np.ndarray:
    """(RESAMPLES,) means over runs of the same items, drawn again: within each group, or for all groups at once.

    The draws depend on the items' numbers alone, so that runs can be compared draw by draw.
    """
    generator, first = np.random.default_rng(0), scores[0]
    if first.wholes:
        count = len(first.wholes)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
        return np.mean([_mean_ratio(drawn @ score.parts, drawn @ score.wholes) for score in scores], axis=0)
    items, groups, means = np.mean([score.items for score in scores], axis=0), np.asarray(first.groups), []
    for group in np.unique(groups):
        mine = items[groups == group]
        means.append(mine[generator.integers(0, len(mine), (RESAMPLES, len(mine)))].mean(axis=1))
    return np.mean(means, axis=0)


@dataclass(frozen=True)
class Results:
    """Scores by (arm, seed) and name; the first arm is the one others are compared with."""

    study: str
    question: str
    arms: tuple[str, ...]
    rows: Mapping[tuple[str, int], Mapping[str, Score]]
    settings: Mapping

    @property
    def names(self) -> list[str]:
        """Names of the scores."""
        return list(dict.fromkeys(name for scores in self.rows.values() for name in scores))

    def scores(self, arm: str, name: str, seeds: Sequence[int] | None = None) -> list[Score]:
        """Scores of an arm, of all its finished seeds or those given."""
        return [
            found[name]
            for (of, seed), found in self.rows.items()
            if of == arm and name in found and (seeds is None or seed in seeds)
        ]

    def seeds(self, arm: str) -> list[int]:
        """The finished seeds of an arm."""
        return [seed for of, seed in self.rows if of == arm]

    def summary(self) -> list[dict]:
        """One row an arm and score: mean, interval, and the difference to the first arm over seeds that both have."""
        found = []
        for name in self.names:
            for arm in self.arms:
                scores = self.scores(arm, name)
                if not scores:
                    continue
                whole = interval(scores)
                row = {"arm": arm, "score": name, "seeds": len(scores), "mean": whole.mean, "low": whole.low}
                row |= {"high": whole.high, "interval": whole.kind}
                both = [seed for seed in self.seeds(arm) if seed in self.seeds(self.arms[0])]
                if arm != self.arms[0] and both:
                    apart = difference(self.scores(arm, name, both), self.scores(self.arms[0], name, both))
                    row |= {"difference": apart.mean, "difference_low": apart.low, "difference_high": apart.high}
                found.append(row)
        return found

    def table(self) -> str:
        """A Markdown table, one row an arm, one column a score; the last column compares the first score."""
        summary = self.summary()
        lines = [
            f"| arm | seeds | {' | '.join(self.names)} | {self.names[0]} minus {self.arms[0]} |",
            "|---" * (len(self.names) + 3) + "|",
        ]
        for arm in self.arms:
            mine = {row["score"]: row for row in summary if row["arm"] == arm}
            if not mine:
                continue
            first = mine[self.names[0]]
            cells = [_cell(*(mine[name][key] for key in BOUNDS)) if name in mine else "" for name in self.names]
            apart = "" if "difference" not in first else _cell(*(first[key] for key in APART), sign="+")
            lines.append(f"| {arm} | {first['seeds']} | {' | '.join(cells)} | {apart} |")
        kinds = {row["interval"] for row in summary}
        notes = {
            "seeds": "Intervals: 95 %, Student's t over seeds.",
            "items": "Intervals: 95 %, bootstrap over test images; they do not cover other seeds.",
        }
        return "\n".join([*lines, "", *(notes[kind] for kind in sorted(kinds) if kind in notes)]) + "\n"

    def write(self, out: Path) -> None:
        """results.json, results.csv, table.md and plot.png."""
        summary = self.summary()
        runs = [
            {"arm": arm, "seed": seed, **{name: score.value for name, score in scores.items()}}
            for (arm, seed), scores in self.rows.items()
        ]
        whole = {"study": self.study, "question": self.question, "settings": self.settings, "runs": runs}
        (out / "results.json").write_text(json.dumps(whole | {"summary": summary}, indent=1) + "\n")
        with (out / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["arm", "seed", *self.names])
            writer.writeheader()
            writer.writerows(runs)
        (out / "table.md").write_text(f"{self.question}\n\n{self.table()}")
        self.plot(out / "plot.png")

    def plot(self, path: Path) -> None:
        """The first score: every arm a mean with its interval and its runs; beside it the difference to the first arm,
        which is paired and so surer than the two intervals look."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
        from matplotlib.figure import Figure

        name, arms = self.names[0], [arm for arm in self.arms if self.seeds(arm)]
        rows = {row["arm"]: row for row in self.summary() if row["score"] == name}
        figure = Figure(figsize=(9.6, 1.7 + 0.5 * len(arms)), layout="constrained")
        figure.suptitle("\n".join(wrap(self.question, 100)), x=0.01, ha="left", fontsize=11)
        values, differences = figure.subplots(1, 2, sharey=True)
        for place, arm in enumerate(arms):
            _bar(values, place, [rows[arm][key] for key in BOUNDS])
            runs = [score.value for score in self.scores(arm, name)]
            values.plot(runs, [place] * len(runs), "|", color="#c2500a", markersize=14)
            if "difference" in rows[arm]:
                _bar(differences, place, [rows[arm][key] for key in APART])
        differences.axvline(0.0, color="#3b4048", linewidth=1)
        values.set_yticks(range(len(arms)), arms)
        values.set_ylim(len(arms) - 0.5, -0.5)
        values.set_xlabel(f"{name} (dot: mean, bar: 95 %, ticks: runs)")
        differences.set_xlabel(f"minus {self.arms[0]} (paired, bar: 95 %)")
        for axes in (values, differences):
            axes.grid(axis="x", color="#dcdee3")
            axes.locator_params(axis="x", nbins=5)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=150)


def _bar(axes, place: int, bounds: Sequence[float | None]) -> None:
    """A mean as a dot and, where there are any, its ends as a bar."""
    mean, low, high = bounds
    if low is not None:
        axes.plot([low, high], [place, place], color="#0b62b0", linewidth=2.5, solid_capstyle="butt")
    axes.plot(mean, place, "o", color="#0b62b0", markersize=9, zorder=3)


def _cell(mean: float, low: float | None, high: float | None, sign: str = "") -> str:
    if low is None:
        return f"{mean:{sign}.4f}"
    return f"{mean:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"
