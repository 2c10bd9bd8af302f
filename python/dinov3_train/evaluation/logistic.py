"""Multinomial logistic regression on frozen features over a grid of regularisation, solved by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from dinov3_train.evaluation.extract import Extracted
from dinov3_train.evaluation.heads import best_of
from dinov3_train.evaluation.labelled import accuracies, accuracy_groups, chance, labelled, split_labelled
from dinov3_train.evaluation.measure import ProbeResult


@dataclass(frozen=True, kw_only=True)
class LogisticSettings:
    """How the classifier is found.

    strengths: values of C, the weight of the data against the squared norm of the weights; the one with the best
        accuracy on `held_out` of the training images is taken and solved again on all of them.
    iterations: at most so many of L-BFGS for each; tolerance: largest gradient at which it stops.
    shots: few-shot, this many training images of each class; None: all. seed: of the draws.
    """

    strengths: tuple[float, ...] = tuple(10.0**power for power in range(-4, 5))
    held_out: float = 0.1
    iterations: int = 1000
    tolerance: float = 1e-6
    shots: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.strengths or not all(strength > 0 for strength in self.strengths):
            raise ValueError(f"strengths: expected numbers above 0, got {self.strengths}")
        if self.iterations < 1 or not self.tolerance > 0:
            raise ValueError(
                f"iterations: expected at least 1, tolerance: expected above 0, got {self.iterations}, {self.tolerance}"
            )


DEFAULTS = LogisticSettings()


def evaluate_logistic(
    train: Extracted,
    test: Extracted,
    *,
    settings: LogisticSettings = DEFAULTS,
    progress: Callable[[str, int, int], None] | None = None,
) -> ProbeResult:
    """Classify labelled test images by logistic regression on the labelled training images.

    Errors: ValueError as `labelled` says, or for a held-out share outside (0, 1).
    Source: the logistic regression of DINOv2 and DINOv3 (arXiv 2304.07193, 2508.10104).
    """
    found = labelled("evaluate_logistic", train, test, shots=settings.shots, seed=settings.seed)
    report = progress or (lambda what, done, total: None)
    strengths, classes = sorted(settings.strengths), len(found.classes)
    parts = split_labelled(found.train_labels, settings.held_out, settings.seed)
    details = {}
    if len(strengths) > 1 and parts is not None:
        kept, held_out = parts
        scores, start = [], None
        for number, strength in enumerate(strengths):  # each starts where the weaker one before it ended
            start = fit(found.train[kept], found.train_labels[kept], classes, strength, settings=settings, start=start)
            right = (predict(start, found.train[held_out]) == found.train_labels[held_out]).double().mean()
            scores.append(float(right))
            report("regularisation", number + 1, len(strengths))
        strength = strengths[best_of(scores)]
        details = {
            "held_out_images": len(held_out),
            "held_out_accuracy": [{"strength": s, "accuracy": score} for s, score in zip(strengths, scores)],
        }
    else:  # one image of each class cannot choose: the middle of the grid
        strength = strengths[len(strengths) // 2]
    weights = fit(found.train, found.train_labels, classes, strength, settings=settings)
    predicted = predict(weights, found.test)
    return ProbeResult(
        probe="logistic",
        metrics=accuracies(predicted, found.test_labels),
        chance=chance(found),
        counts=found.counts,
        settings={**test.settings, **asdict(settings)},
        details={**details, "strength": strength},
        groups=accuracy_groups(found, predicted),
    )


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    *,
    settings: LogisticSettings = DEFAULTS,
    start: Tensor | None = None,
) -> Tensor:
    """Weights and biases (C, D + 1), float64, of the classifier that minimises

    mean_i CE(W x_i + b, y_i) + |W|^2 / (2 strength m)

    Args:
        features: (m, D); they are used as they are, neither centred nor scaled.
        labels: (m,), int64 in [0, C).
        strength: C of scikit-learn's LogisticRegression, whose minimum is the same.
        settings: iterations and tolerance.
        start: weights (C, D + 1) to begin with; None: zeros.
    """
    rows = F.pad(features.double(), (0, 1), value=1.0)  # (m, D + 1)
    truth = F.one_hot(labels, classes).double()
    decay = torch.full((rows.shape[1],), 1 / (strength * len(rows)), dtype=torch.float64)
    decay[-1] = 0.0  # the bias is free

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(classes, -1)
        likelihoods = (rows @ weights.T).log_softmax(dim=1)
        value = -(likelihoods * truth).sum() / len(rows) + 0.5 * (weights.square() * decay).sum()
        gradient = (likelihoods.exp() - truth).T @ rows / len(rows) + weights * decay
        return float(value), gradient.flatten().numpy()

    begin = torch.zeros(classes, rows.shape[1], dtype=torch.float64) if start is None else start
    options = {"maxiter": settings.iterations, "gtol": settings.tolerance, "ftol": 0.0, "maxfun": 10**9}
    solved = minimize(value_and_gradient, begin.flatten().numpy(), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(solved.x).view(classes, -1)


def predict(weights: Tensor, features: Tensor) -> Tensor:
    """The likeliest class (n,) of features (n, D) under weights (C, D + 1)."""
    return (F.pad(features.double(), (0, 1), value=1.0) @ weights.T).argmax(dim=1)
