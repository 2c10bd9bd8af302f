"""Weighted k-nearest-neighbour classification on frozen features, as in DINO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_train.evaluation.extract import Extracted
from dinov3_train.evaluation.labelled import Labelled, accuracies, accuracy_groups, labelled
from dinov3_train.evaluation.measure import Groups, plain

BLOCK = 1024  # test rows whose similarities to all training rows are in memory at once


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1] for one k: of all test images, and the mean over classes of each class's share.

    Intervals are (low, high) of the bootstrap over test images.
    """

    k: int
    accuracy: float
    mean_per_class: float
    accuracy_interval: tuple[float, float]
    mean_per_class_interval: tuple[float, float]


@dataclass(frozen=True)
class KnnResult:
    """Scores in the order of the k that were asked for, and all that is needed to compare them with others.

    groups: accuracy by group at the best k, where the test images have groups.
    """

    scores: tuple[Score, ...]
    temperature: float
    train_images: int
    test_images: int
    classes: int
    train_unlabelled: int
    test_unlabelled: int
    settings: dict = field(default_factory=dict)
    groups: Groups | None = None

    @property
    def best(self) -> Score:
        """The score with the highest mean per class; the first of equals."""
        return max(self.scores, key=lambda score: score.mean_per_class)

    def at(self, k: int) -> Score:
        """The score of one k. Errors: ValueError when it was not asked for."""
        for score in self.scores:
            if score.k == k:
                return score
        raise ValueError(f"KnnResult: k expects one of {[score.k for score in self.scores]}, got {k}")

    def to_dict(self) -> dict:
        """Plain dictionaries and lists; None for what is not a finite number."""
        return plain({"probe": "knn", **asdict(self)})

    def write(self, path: str | Path) -> Path:
        """Write the result as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path


def evaluate_knn(
    train: Extracted,
    test: Extracted,
    *,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    shots: int | None = None,
    seed: int = 0,
) -> KnnResult:
    """Classify each labelled test image by its nearest labelled training images.

    Images without a label (-1) are left out on both sides and counted. `mean_per_class` averages over the classes that
    occur in `test`. Classes are matched by name where both sides name theirs, so two folders may number them
    differently. shots: few-shot, this many training images of each class, drawn by `seed`; None: all.

    Errors: ValueError when a side has no label, the training images have one class only, a test class has no training
    image, a k exceeds the training images, or the features differ in width or settings.
    """
    found = labelled("evaluate_knn", train, test, shots=shots, seed=seed)
    predictions = predict(found.train, found.train_labels, found.test, k=k, temperature=temperature)  # (len(k), n)
    scores = tuple(_score(int(n), row, found) for n, row in zip(k, predictions))
    few = {} if shots is None else {"shots": shots, "seed": seed}
    result = KnnResult(scores, temperature=float(temperature), **found.counts, settings={**test.settings, **few})
    if found.groups is None:
        return result
    return replace(result, groups=accuracy_groups(found, predictions[scores.index(result.best)]))


def predict(
    train: Tensor, labels: Tensor, test: Tensor, *, k: Sequence[int], temperature: float, block: int = BLOCK
) -> Tensor:
    """The class of each test row for each k.

    class = argmax_c sum_{i in the k most similar} [labels_i = c] exp(cos(test, train_i) / temperature)

    Args:
        train: (m, D), any scale; rows are L2-normalised in fp32.
        labels: (m,), int64, at least 0.
        test: (n, D), on the same device.
        k: numbers of neighbours, each in [1, m].
        temperature: above 0.
        block: test rows at once; the result does not depend on it beyond rounding.

    Returns int64 (len(k), n); of equal sums the smaller label wins.
    Errors: ValueError for an empty or out-of-range k, a temperature that is not positive, non-finite features.
    Source: DINO (arXiv 2104.14294) appendix, after Wu et al. (arXiv 1805.01978).
    """
    counts = [int(n) for n in k]
    if not counts or min(counts) < 1 or max(counts) > len(train):
        raise ValueError(f"knn: k expects numbers from 1 to the {len(train)} training images, got {list(k)}")
    if not temperature > 0:
        raise ValueError(f"knn: temperature expects a number above 0, got {temperature}")
    if not (torch.isfinite(train).all() and torch.isfinite(test).all()):
        raise ValueError("knn: features expect finite numbers, got NaN or infinity")
    bank = F.normalize(train.float(), dim=1)
    classes = int(labels.max()) + 1
    predictions = []
    for rows in F.normalize(test.float(), dim=1).split(block):
        similarity, neighbour = (rows @ bank.T).topk(max(counts), dim=1)  # (b, k), most similar first
        # Relative to the nearest neighbour: the same argmax, and no overflow at small temperatures.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        predictions.append(_votes(weight, labels[neighbour], counts, classes).argmax(dim=2))
    return torch.cat(predictions, dim=1) if predictions else labels.new_empty((len(counts), 0))


def _votes(weight: Tensor, label: Tensor, counts: list[int], classes: int) -> Tensor:
    """Sums of weights (b, k) per class after each count of neighbours: (len(counts), b, C)."""
    votes, after = weight.new_zeros((len(weight), classes)), {}
    rows = torch.arange(len(weight), device=weight.device)
    for number in range(max(counts)):
        # One neighbour at a time: no two additions meet, so the order of the sum is fixed on GPUs too.
        votes[rows, label[:, number]] += weight[:, number]
        if number + 1 in counts:
            after[number + 1] = votes.clone()
    return torch.stack([after[count] for count in counts])


def _score(k: int, predicted: Tensor, found: Labelled) -> Score:
    shares = accuracies(predicted, found.test_labels)
    accuracy, per_class = shares["accuracy"], shares["mean_per_class"]
    intervals = (accuracy.low, accuracy.high), (per_class.low, per_class.high)
    return Score(k, accuracy.value, per_class.value, *intervals)
