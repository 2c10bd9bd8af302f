"""Labelled features of two sources made comparable: one numbering of classes, nothing without a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinov3_train.counter import permutation
from dinov3_train.evaluation.extract import UNLABELLED, Extracted, groups_of
from dinov3_train.evaluation.measure import ClassMeans, Groups, Measured, by_group, mean_of, measured

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source


@dataclass(frozen=True)
class Labelled:
    """Training features (m, D) and labels (m,), test features (n, D) and labels (n,), labels from 0 to C - 1.

    rows: (m,) of the training images in what was extracted; groups: of the n test images, or None.
    classes: C names, or the numbers of the sources as text.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    rows: Tensor
    classes: tuple[str, ...]
    train_unlabelled: int
    test_unlabelled: int
    groups: tuple[str | None, ...] | None

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of images and classes."""
        return {
            "train_images": len(self.train_labels),
            "test_images": len(self.test_labels),
            "classes": len(self.classes),
            "train_unlabelled": self.train_unlabelled,
            "test_unlabelled": self.test_unlabelled,
        }


def labelled(probe: str, train: Extracted, test: Extracted, *, shots: int | None = None, seed: int = 0) -> Labelled:
    """What a classifier is trained and judged on.

    Images without a label (-1) are left out on both sides and counted. Classes are matched by name where both sides
    name theirs, so two folders may number them differently.

    Args:
        probe: named in errors.
        shots: few-shot, this many training images of each class (all where a class has fewer); None: all.
        seed: of the draw of shots.

    Errors: ValueError when a side has no label, the training images have one class only, a test class has no training
        image, or the features differ in width or settings, or are not finite.
    """
    _check_comparable(probe, train, test)
    aligned = _aligned(probe, train, test)
    kept, test_kept = train.labels != UNLABELLED, aligned != UNLABELLED
    for side, found in (("training", kept), ("test", test_kept)):
        if not found.any():
            raise ValueError(f"{probe}: expected labelled {side} images, got {len(found)} images without one label")
    rows = kept.nonzero().flatten()
    if shots is not None:
        rows = _few(rows, train.labels[rows], shots, seed)
    _check_classes(probe, train.labels[rows], aligned[test_kept], train.classes)
    numbers, labels = train.labels[rows].unique(return_inverse=True)
    return Labelled(
        train=train.features[rows],
        train_labels=labels,
        test=test.features[test_kept],
        test_labels=torch.searchsorted(numbers, aligned[test_kept]),
        rows=rows,
        classes=tuple(_name(number, train.classes) for number in numbers.tolist()),
        train_unlabelled=int((~kept).sum()),
        test_unlabelled=int((~test_kept).sum()),
        groups=None if test.groups is None else tuple(g for g, used in zip(test.groups, test_kept.tolist()) if used),
    )


def check_sources(
    probe: str, train: Source, test: Source, *, group: str | None = None, shots: int | None = None, k: int = 1
) -> None:
    """What `labelled`, groups and k-NN would refuse, from labels alone, before any image is decoded.

    group: name of what the test source says about its images; k: largest number of neighbours.
    Errors: ValueError as `labelled` says, for a group that no image has or only one, or fewer training images than k.
    """
    blank = [_blank(source) for source in (train, test)]
    found = labelled(probe, *blank, shots=shots)
    if k > len(found.train_labels):
        raise ValueError(f"{probe}: k expects numbers from 1 to the {len(found.train_labels)} training images, got {k}")
    if group is not None:
        names = {name for name in groups_of(test, range(len(test)), group) if name is not None}
        if len(names) < 2:
            raise ValueError(f"group: expected at least two groups of test images, got {sorted(names)}")


def _blank(source: Source) -> Extracted:
    """The labels of a source beside features of zeros."""
    labels = [source.label(number) for number in range(len(source))]
    return Extracted(
        features=torch.zeros(len(labels), 1),
        labels=torch.tensor([UNLABELLED if label is None else int(label) for label in labels], dtype=torch.int64),
        names=tuple(map(str, range(len(labels)))),
        classes=None if source.classes is None else tuple(source.classes),
    )


def accuracies(predicted: Tensor, labels: Tensor) -> dict[str, Measured]:
    """Shares in [0, 1]: the mean over the occurring classes of each class's share of right answers, and of all images.

    predicted, labels: (n,).
    """
    right = (predicted == labels).double()
    return {"mean_per_class": measured(ClassMeans(right, labels)), "accuracy": measured(mean_of(right))}


def accuracy_groups(found: Labelled, predicted: Tensor) -> Groups | None:
    """Accuracy by group of the test images, None where there are no groups.

    Accuracy and not its mean per class: groups hold different classes, and few images of each.
    """
    if found.groups is None:
        return None
    return by_group("accuracy", mean_of((predicted == found.test_labels).double()), found.groups)


def chance(found: Labelled) -> dict[str, float]:
    """What answers that know nothing of the image reach: 1 / C per class of the test, the commonest class for all."""
    common = found.train_labels.bincount(minlength=len(found.classes)).argmax()
    return {
        "mean_per_class": 1 / len(found.test_labels.unique()),
        "accuracy": float((found.test_labels == common).double().mean()),
    }


def split_labelled(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor] | None:
    """(training, held-out) numbers of images, int64; each class keeps one to train on.

    None where every class has one image only. Errors: ValueError for a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out: expected a share in (0, 1), got {share}")
    wanted = max(round(share * len(labels)), 1)
    left = labels.bincount()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for number in permutation(seed, "evaluation/held-out", len(labels)).tolist():
        if wanted and left[labels[number]] > 1:
            held_out[number] = True
            left[labels[number]] -= 1
            wanted -= 1
    if not held_out.any():
        return None
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def _few(rows: Tensor, labels: Tensor, shots: int, seed: int) -> Tensor:
    if shots < 1:
        raise ValueError(f"shots: expected at least 1 image of each class, got {shots}")
    taken, left = [], dict.fromkeys(labels.unique().tolist(), shots)
    for place in permutation(seed, "evaluation/shots", len(rows)).tolist():
        label = int(labels[place])
        if left[label]:
            left[label] -= 1
            taken.append(place)
    return rows[torch.tensor(sorted(taken))]


def _name(number: int, classes: tuple[str, ...] | None) -> str:
    return classes[number] if classes is not None and number < len(classes) else str(number)


def _check_comparable(probe: str, train: Extracted, test: Extracted) -> None:
    if train.features.shape[1] != test.features.shape[1]:
        widths = f"{train.features.shape[1]} and {test.features.shape[1]}"
        raise ValueError(f"{probe}: training and test features expect one width, got {widths}")
    if train.settings != test.settings:
        differing = [
            key for key in {**train.settings, **test.settings} if train.settings.get(key) != test.settings.get(key)
        ]
        raise ValueError(f"{probe}: training and test features expect the same settings, differing: {differing}")
    for side in (train, test):
        if not torch.isfinite(side.features).all():
            raise ValueError(f"{probe}: features expect finite numbers, got NaN or infinity")


def _aligned(probe: str, train: Extracted, test: Extracted) -> Tensor:
    """Test labels (n,) in the training numbering: by name where both sides name their classes, else as they are."""
    if train.classes is None or test.classes is None or train.classes == test.classes:
        return test.labels
    used = [test.classes[label] for label in test.labels[test.labels != UNLABELLED].unique().tolist()]
    unknown = [name for name in used if name not in train.classes]
    if unknown:
        raise ValueError(f"{probe}: every test class needs a training class of that name, none for: {_listed(unknown)}")
    number = {name: index for index, name in enumerate(train.classes)} | {None: UNLABELLED}
    names = [None if label == UNLABELLED else test.classes[label] for label in test.labels.tolist()]
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


def _check_classes(probe: str, train_labels: Tensor, test_labels: Tensor, classes: tuple[str, ...] | None) -> None:
    wrong = [int(labels.min()) for labels in (train_labels, test_labels) if labels.min() < 0]
    if wrong:
        raise ValueError(f"{probe}: labels expect class numbers from 0, got {wrong[0]}")
    known = set(train_labels.tolist())
    if len(known) < 2:
        raise ValueError(f"{probe}: expected at least two classes among the training images, got {len(known)}")
    missing = sorted(set(test_labels.tolist()) - known)
    if missing:
        names = [_name(label, classes) for label in missing]
        raise ValueError(f"{probe}: every test class needs a training image, none for: {_listed(names)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
