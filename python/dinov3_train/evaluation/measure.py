"""Metrics that are known with their uncertainty: value, bootstrap interval, and the same by group of images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dinov3_train.counter import image_seed

SAMPLES, LEVEL = 1000, 0.95
BLOCK = 100  # resamples drawn at once


class Judged(Protocol):
    """n judged images of which any weighting gives a metric."""

    def __len__(self) -> int: ...

    def metric(self, weights: Tensor) -> Tensor:
        """weights (b, n) float64, how often each image counts -> (b,), NaN where the metric is undefined."""

    def of(self, rows: Tensor) -> Judged:
        """The same for some images: rows (m,) of numbers or (n,) of truth values."""


@dataclass(frozen=True)
class Statistics:
    """Numbers per image whose sums over images give a metric: metric = reduce(sum over images of values).

    values: (n, ...), any number type; reduce: sums (b, ...) float64 -> (b,), NaN where the metric is undefined.
    """

    values: Tensor
    reduce: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.values)

    def metric(self, weights: Tensor) -> Tensor:
        """As `Judged` says."""
        sums = weights @ self.values.double().flatten(1)  # (b, S)
        return self.reduce(sums.unflatten(1, self.values.shape[1:]))

    def of(self, rows: Tensor) -> Statistics:
        """As `Judged` says."""
        return Statistics(self.values[rows], self.reduce)


@dataclass(frozen=True)
class ClassMeans:
    """Mean over the classes that occur of each class's share of right answers: right (n,), labels (n,) from 0."""

    right: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def metric(self, weights: Tensor) -> Tensor:
        """As `Judged` says."""
        sums = weights.new_zeros(2, len(weights), int(self.labels.max()) + 1)
        sums[0].index_add_(1, self.labels, weights * self.right.double())
        sums[1].index_add_(1, self.labels, weights)
        return (sums[0] / sums[1]).nanmean(dim=1)

    def of(self, rows: Tensor) -> ClassMeans:
        """As `Judged` says."""
        return ClassMeans(self.right[rows], self.labels[rows])


@dataclass(frozen=True)
class Measured:
    """A metric, its bootstrap interval and the number of images it comes from."""

    value: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Groups:
    """One metric by group of images. gap: best minus worst value, at least 0; without: images that have no group."""

    metric: str
    scores: dict[str, Measured]
    worst: str
    best: str
    gap: float
    without: int


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe found, and all that is needed to compare it with others.

    metrics: the first is the probe's main one; chance: what predictions that know nothing of the image reach, by
    metric; counts: images, classes and the like; details: what led to the metrics, such as the scores of each setting.
    """

    probe: str
    metrics: dict[str, Measured]
    chance: dict[str, float]
    counts: dict[str, int]
    settings: dict
    details: dict = field(default_factory=dict)
    groups: Groups | None = None

    @property
    def main(self) -> Measured:
        """The probe's main metric."""
        return next(iter(self.metrics.values()))

    def to_dict(self) -> dict:
        """Plain dictionaries and lists; None for what is not a finite number."""
        return plain(asdict(self))

    def write(self, path: str | Path) -> Path:
        """Write the result as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path


def plain(value: object) -> object:
    """Dictionaries, lists, texts and finite numbers as JSON holds them; None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def value_of(judged: Judged) -> float:
    """The metric over all images."""
    return float(judged.metric(torch.ones(1, len(judged), dtype=torch.float64))[0])


def measured(judged: Judged, *, samples: int = SAMPLES, level: float = LEVEL, seed: int = 0) -> Measured:
    """A metric with its percentile bootstrap interval over images.

    Args:
        judged: n >= 1 images.
        samples: how often n images are drawn from the n, with replacement.
        level: share of the resampled values inside the interval, in (0, 1).
        seed: of the draws.

    Resamples in which the metric is undefined (NaN) are left out; an interval without any left is NaN.
    Errors: ValueError for no images.
    Source: Efron, Bootstrap methods (Annals of Statistics 7, 1979).
    """
    count = len(judged)
    if count == 0:
        raise ValueError("measured: expected at least one image, got none")
    generator = np.random.Generator(np.random.Philox(image_seed(seed, "bootstrap", 0)))
    found = []
    for start in range(0, samples, BLOCK):
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=min(BLOCK, samples - start))
        found.append(judged.metric(torch.from_numpy(drawn).double()))
    values = torch.cat(found)
    values = values[~values.isnan()]
    outside = (1 - level) / 2
    shares = torch.tensor([outside, 1 - outside], dtype=torch.float64)
    low, high = values.quantile(shares).tolist() if len(values) else (float("nan"), float("nan"))
    return Measured(value_of(judged), low, high, count)


def by_group(
    metric: str, judged: Judged, groups: Sequence[str | None], *, higher_is_better: bool = True, seed: int = 0
) -> Groups:
    """The metric of each group's images, the worst group and the gap to the best.

    Args:
        metric: its name.
        judged: n images.
        groups: the n images' groups, None where there is none.

    Errors: ValueError for fewer than two groups.
    """
    names = sorted({group for group in groups if group is not None})
    if len(names) < 2:
        raise ValueError(f"group: expected at least two groups of test images, got {names or 'none'}")
    scores = {name: measured(judged.of(torch.tensor([group == name for group in groups])), seed=seed) for name in names}
    known = {name: score.value for name, score in scores.items() if score.value == score.value}
    if not known:
        raise ValueError(f"group: {metric} is not defined in any of the {len(names)} groups")
    ends = min(known, key=known.get), max(known, key=known.get)
    worst, best = ends if higher_is_better else ends[::-1]
    return Groups(metric, scores, worst, best, abs(known[best] - known[worst]), sum(group is None for group in groups))


def mean_of(values: Tensor) -> Statistics:
    """The mean of one number per image: values (n,)."""
    return ratio_of(values, torch.ones_like(values, dtype=torch.float64))


def ratio_of(numerators: Tensor, denominators: Tensor) -> Statistics:
    """sum of numerators / sum of denominators, both (n,): a mean over parts of which each image has its own number."""
    return Statistics(
        torch.stack([numerators.double(), denominators.double()], dim=1), lambda sums: sums[:, 0] / sums[:, 1]
    )
