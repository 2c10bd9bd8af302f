"""Linear heads trained side by side on frozen features: every learning rate and weight decay in one product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from dinov3_train.counter import image_seed, permutation

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """How linear heads are trained; one head for each pair of a learning rate and a weight decay.

    optimizer: "sgd" (momentum 0.9) or "adamw" with `betas`.
    steps, batch_size: in images; images come in a new random order each time all were seen.
    warmup: steps over which the rate rises linearly from 0; None: a tenth of the steps.
    schedule: "cosine" to 0 after the warm-up, or "constant".
    dropout: share of feature channels that an image loses in a step, in [0, 1).
    clip: largest norm of a head's gradient; None: not clipped.
    """

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.0,)
    optimizer: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    steps: int = 1000
    batch_size: int = 128
    warmup: int | None = 0
    schedule: str = "cosine"
    dropout: float = 0.0
    clip: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name, rule in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in rule:
                raise ValueError(f"{name}: expected one of {', '.join(rule)}, got {getattr(self, name)!r}")
        if not self.learning_rates or not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates: expected numbers above 0, got {self.learning_rates}")
        if not self.weight_decays or not all(decay >= 0 for decay in self.weight_decays):
            raise ValueError(f"weight_decays: expected numbers of at least 0, got {self.weight_decays}")
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.rising < self.steps:
            raise ValueError(
                f"steps, batch_size: expected at least 1, warmup: expected from 0 to below steps, "
                f"got {self.steps}, {self.batch_size}, {self.rising}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {self.dropout}")

    @property
    def grid(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each head."""
        return list(product(self.learning_rates, self.weight_decays))

    @property
    def rising(self) -> int:
        """Steps of warm-up."""
        return self.steps // 10 if self.warmup is None else self.warmup

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied with at a step."""
        if step < self.rising:
            return (step + 1) / (self.rising + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.rising) / (self.steps - self.rising)))


@dataclass(frozen=True)
class Heads:
    """Linear heads: weight (H, C, D), bias (H, C), fp32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """features (..., D) -> (H, ..., C)."""
        heads, classes, _ = self.weight.shape
        found = features.flatten(0, -2) @ self.weight.flatten(0, 1).T + self.bias.flatten()  # (n, H C)
        return found.unflatten(1, (heads, classes)).movedim(1, 0).unflatten(1, features.shape[:-1])

    def one(self, number: int) -> Heads:
        """A single head."""
        return Heads(self.weight[number : number + 1], self.bias[number : number + 1])


def train_heads(
    batch: Callable[[Tensor, Tensor], tuple[Tensor, object]],
    loss: Callable[[Tensor, object], Tensor],
    *,
    images: int,
    shape: tuple[int, int],
    settings: HeadTraining,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Heads:
    """Train all heads of the grid at once, on the same batches in the same order.

    Args:
        batch: numbers (b,) of images in [0, images), how often each has been seen before (b,) -> (features (b, ..., D)
            on the device, their targets).
        loss: (logits (H, b, ..., C), targets) -> (H,), the loss of each head.
        images: how many there are.
        shape: (C, D).
        settings: rates, steps and the like; the order of images and the dropped channels follow from its seed.
        device: of the heads.
        progress: called with (steps done, steps in all) every few steps.

    Heads start at zero for a convex loss: the result depends on the seed through the order of images alone.
    Errors: ValueError when every head's loss becomes non-finite.
    """
    classes, width = shape
    weights = [nn.Parameter(torch.zeros(classes, width, device=device)) for _ in settings.grid]
    biases = [nn.Parameter(torch.zeros(classes, device=device)) for _ in settings.grid]
    optimizer = _optimizer(weights, biases, settings)
    order = _Order(images, settings)
    for step in range(settings.steps):
        for group, (rate, _) in zip(optimizer.param_groups, settings.grid):
            group["lr"] = rate * settings.factor(step)
        features, targets = batch(*order.next())
        if settings.dropout:
            features = features * _kept_channels(features, settings, step)
        losses = loss(Heads(torch.stack(weights), torch.stack(biases))(features), targets)  # (H,)
        optimizer.zero_grad()
        losses.sum().backward()
        if settings.clip is not None:
            for weight, bias in zip(weights, biases):
                nn.utils.clip_grad_norm_((weight, bias), settings.clip)
        optimizer.step()
        if progress is not None and (step % 20 == 19 or step + 1 == settings.steps):
            progress(step + 1, settings.steps)
    if not torch.isfinite(losses).any():
        raise ValueError(f"heads: no learning rate of {settings.learning_rates} gives a finite loss")
    return Heads(torch.stack([weight.detach() for weight in weights]), torch.stack([bias.detach() for bias in biases]))


def split(images: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) numbers of `images`, int64: at least one is held out and at least one trains.

    Errors: ValueError for fewer than two images or a share outside (0, 1).
    """
    if images < 2 or not 0 < share < 1:
        raise ValueError(f"held_out: expected a share in (0, 1) of at least two images, got {share} of {images}")
    order = torch.from_numpy(permutation(seed, "evaluation/held-out", images))
    count = min(max(round(share * images), 1), images - 1)
    return order[count:].sort().values, order[:count].sort().values


def _optimizer(weights: list[nn.Parameter], biases: list[nn.Parameter], settings: HeadTraining):
    groups = [
        {"params": [weight, bias], "lr": rate, "weight_decay": decay}
        for weight, bias, (rate, decay) in zip(weights, biases, settings.grid)
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=1.0, betas=settings.betas)


class _Order:
    """Batches of image numbers: one permutation after another, cut into pieces of the batch size."""

    def __init__(self, images: int, settings: HeadTraining) -> None:
        self._images, self._settings, self._epoch = images, settings, 0
        self._left = torch.empty(2, 0, dtype=torch.int64)  # numbers, epochs

    def next(self) -> tuple[Tensor, Tensor]:
        """Numbers and epochs, int64 (batch size,), or all images where there are fewer."""
        size = min(self._settings.batch_size, self._images)
        while self._left.shape[1] < size:
            order = permutation(self._settings.seed, f"evaluation/epoch/{self._epoch}", self._images)
            epoch = torch.full((self._images,), self._epoch)
            self._left = torch.cat([self._left, torch.stack([torch.from_numpy(order), epoch])], dim=1)
            self._epoch += 1
        taken, self._left = self._left[:, :size], self._left[:, size:]
        return taken[0], taken[1]


def _kept_channels(features: Tensor, settings: HeadTraining, step: int) -> Tensor:
    """(b, 1, ..., D): 0 for channels an image loses, else 1 / (1 - dropout)."""
    generator = torch.Generator().manual_seed(image_seed(settings.seed, "evaluation/dropout", step))
    shape = (features.shape[0], *(1 for _ in features.shape[1:-1]), features.shape[-1])
    kept = torch.rand(shape, generator=generator) >= settings.dropout
    return kept.to(features.device, features.dtype) / (1 - settings.dropout)


def best_of(scores: Sequence[float]) -> int:
    """Number of the highest score, the first of equals; NaN counts below everything."""
    return max(range(len(scores)), key=lambda number: (scores[number] == scores[number], scores[number], -number))
