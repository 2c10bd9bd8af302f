"""Linear probe: one linear layer on frozen features by SGD, all learning rates at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_train.evaluation.extract import Extracted
from dinov3_train.evaluation.heads import Heads, HeadTraining, best_of, train_heads
from dinov3_train.evaluation.labelled import Labelled, accuracies, accuracy_groups, chance, labelled, split_labelled
from dinov3_train.evaluation.measure import ProbeResult

TRAINING = HeadTraining(
    learning_rates=(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0), steps=1500, batch_size=128
)


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How the layer is trained.

    training: rates, steps, batch of images; where it names several rates or decays, the pair with the best accuracy on
        `held_out` of the training images is taken and trained again on all of them.
    shots: few-shot, this many training images of each class; None: all.
    """

    training: HeadTraining = TRAINING
    held_out: float = 0.1
    shots: int | None = None


DEFAULTS = LinearSettings()


def evaluate_linear(
    train: Extracted,
    test: Extracted,
    *,
    views: Sequence[Extracted] = (),
    settings: LinearSettings = DEFAULTS,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> ProbeResult:
    """Classify labelled test images by a linear layer trained on the labelled training images.

    Features are used as they are.

    Args:
        train, test: features and labels.
        views: features of the same training images under random crops (`AugmentedView`); the layer trains on one after
            another, a new one each time all images were seen. None given: it trains on `train`.
        settings: of the layer; device: where it is trained.
        progress: called with (what, done, in all).

    Errors: ValueError as `labelled` says, for a held-out share outside (0, 1), views of other images, or rates of which
        none is stable.
    Source: the linear probe of DINOv2 and DINOv3 (arXiv 2304.07193, 2508.10104).
    """
    training = settings.training
    found = labelled("evaluate_linear", train, test, shots=settings.shots, seed=training.seed)
    report = progress or (lambda what, done, total: None)
    for view in views:
        if view.names != train.names or view.features.shape != train.features.shape:
            raise ValueError("evaluate_linear: views expect features of the same training images, got others")
    seen = [view.features[found.rows] for view in views] or [found.train]
    parts = split_labelled(found.train_labels, settings.held_out, training.seed)
    details = {}
    if len(training.grid) > 1 and parts is not None:
        kept, held_out = parts
        heads = _fit(found, seen, kept, training, device, lambda *done: report("learning rates", *done))
        scores = _shares(heads, found.train[held_out], found.train_labels[held_out])
        rate, decay = training.grid[best_of(scores)]
        details = {
            "held_out_images": len(held_out),
            "held_out_accuracy": [
                {"learning_rate": r, "weight_decay": d, "accuracy": s} for (r, d), s in zip(training.grid, scores)
            ],
        }
    else:  # one image of each class cannot choose: the middle of the grid
        rate, decay = training.grid[len(training.grid) // 2]
    training = replace(training, learning_rates=(rate,), weight_decays=(decay,))
    everything = torch.arange(len(found.train))
    heads = _fit(found, seen, everything, training, device, lambda *done: report("linear layer", *done))
    predicted = heads(found.test.to(heads.weight.device))[0].argmax(dim=1).cpu()
    return ProbeResult(
        probe="linear",
        metrics=accuracies(predicted, found.test_labels),
        chance=chance(found),
        counts=found.counts,
        settings={**test.settings, "views": len(views), **asdict(settings)},
        details={**details, "learning_rate": rate, "weight_decay": decay},
        groups=accuracy_groups(found, predicted),
    )


def _fit(
    found: Labelled,
    seen: list[Tensor],
    rows: Tensor,
    training: HeadTraining,
    device: torch.device | str,
    progress: Callable,
) -> Heads:
    features = torch.stack([view[rows] for view in seen]).to(device)  # (V, m, D)
    labels = found.train_labels[rows].to(device)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        heads = logits.shape[0]
        each = F.cross_entropy(logits.flatten(0, 1), targets.repeat(heads), reduction="none")
        return each.view(heads, -1).mean(dim=1)

    return train_heads(
        lambda numbers, epochs: (features[epochs % len(seen), numbers], labels[numbers]),
        loss,
        images=len(rows),
        shape=(len(found.classes), features.shape[2]),
        settings=training,
        device=device,
        progress=progress,
    )


def _shares(heads: Heads, features: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of each head; NaN for one whose weights are not finite."""
    predicted = heads(features.to(heads.weight.device)).argmax(dim=2).cpu()  # (H, n)
    shares = (predicted == labels).double().mean(dim=1)
    finite = heads.weight.isfinite().flatten(1).all(dim=1).cpu()
    return torch.where(finite, shares, torch.nan).tolist()
