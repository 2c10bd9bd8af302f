"""Weighted k-nearest-neighbour classification on frozen features, as in DINO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_train.evaluation.extract import UNLABELLED, Extracted

BLOCK = 1024  # test rows whose similarities to all training rows are in memory at once


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1] for one k: of all test images, and the mean over classes of each class's share."""

    k: int
    accuracy: float
    mean_per_class: float


@dataclass(frozen=True)
class KnnResult:
    """Scores in the order of the k that were asked for, and all that is needed to compare them with others."""

    scores: tuple[Score, ...]
    temperature: float
    train_images: int
    test_images: int
    classes: int
    train_unlabelled: int
    test_unlabelled: int
    settings: dict = field(default_factory=dict)

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
        """Plain dictionaries and lists."""
        return asdict(self)

    def write(self, path: str | Path) -> Path:
        """Write the result as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path


def evaluate_knn(
    train: Extracted, test: Extracted, *, k: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07
) -> KnnResult:
    """Classify each labelled test image by its nearest labelled training images.

    Images without a label (-1) are left out on both sides and counted. `mean_per_class` averages over the classes that
    occur in `test`. Classes are matched by name where both sides name theirs, so two folders may number them
    differently.

    Errors: ValueError when a side has no label, the training images have one class only, a test class has no training
    image, a k exceeds the training images, or the features differ in width or settings.
    """
    _check_comparable(train, test)
    aligned = _aligned(train, test)
    train_kept, test_kept = train.labels != UNLABELLED, aligned != UNLABELLED
    for side, kept in (("training", train_kept), ("test", test_kept)):
        if not kept.any():
            raise ValueError(f"evaluate_knn: expected labelled {side} images, got {len(kept)} images without one label")
    train_labels, test_labels = train.labels[train_kept], aligned[test_kept]
    _check_classes(train_labels, test_labels, train.classes)
    predictions = predict(
        train.features[train_kept], train_labels, test.features[test_kept], k=k, temperature=temperature
    )  # (len(k), n)
    scores = tuple(Score(int(n), *_accuracies(row, test_labels)) for n, row in zip(k, predictions))
    return KnnResult(
        scores=scores,
        temperature=float(temperature),
        train_images=len(train_labels),
        test_images=len(test_labels),
        classes=len(train_labels.unique()),
        train_unlabelled=int((~train_kept).sum()),
        test_unlabelled=int((~test_kept).sum()),
        settings=dict(test.settings),
    )


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


def _accuracies(predicted: Tensor, labels: Tensor) -> tuple[float, float]:
    right = (predicted == labels).double()
    per_class = [right[labels == label].mean() for label in labels.unique()]
    return float(right.mean()), float(torch.stack(per_class).mean())


def _check_comparable(train: Extracted, test: Extracted) -> None:
    if train.features.shape[1] != test.features.shape[1]:
        widths = f"{train.features.shape[1]} and {test.features.shape[1]}"
        raise ValueError(f"evaluate_knn: training and test features expect one width, got {widths}")
    if train.settings != test.settings:
        differing = [
            key for key in {**train.settings, **test.settings} if train.settings.get(key) != test.settings.get(key)
        ]
        raise ValueError(f"evaluate_knn: training and test features expect the same settings, differing: {differing}")


def _aligned(train: Extracted, test: Extracted) -> Tensor:
    """Test labels (n,) in the training numbering: by name where both sides name their classes, else as they are."""
    if train.classes is None or test.classes is None or train.classes == test.classes:
        return test.labels
    used = [test.classes[label] for label in test.labels[test.labels != UNLABELLED].unique().tolist()]
    unknown = [name for name in used if name not in train.classes]
    if unknown:
        raise ValueError(
            f"evaluate_knn: every test class needs a training class of that name, none for: {_listed(unknown)}"
        )
    number = {name: index for index, name in enumerate(train.classes)} | {None: UNLABELLED}
    names = [None if label == UNLABELLED else test.classes[label] for label in test.labels.tolist()]
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


def _check_classes(train_labels: Tensor, test_labels: Tensor, classes: tuple[str, ...] | None) -> None:
    known = set(train_labels.tolist())
    if len(known) < 2:
        raise ValueError(f"evaluate_knn: expected at least two classes among the training images, got {len(known)}")
    missing = sorted(set(test_labels.tolist()) - known)
    if missing:
        names = [classes[label] if classes is not None and label < len(classes) else str(label) for label in missing]
        raise ValueError(f"evaluate_knn: every test class needs a training image, none for: {_listed(names)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
