"""Schedules as pure functions of the step: what learning rate, weight decay, momentum and temperature are at step `t`.

Steps count from 0; every value depends on the step alone, so that a resumed run continues exactly.
"""

from __future__ import annotations

import math


def linear(step: int, *, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps` and after."""
    return end if step >= steps else start + (end - start) * step / steps


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at `steps` and after."""
    return end if step >= steps else end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


SHAPES = {"linear": linear, "cosine": cosine}  # of a warm-up


def warmup_constant(step: int, *, peak: float, warmup: int, shape: str = "linear") -> float:
    """From 0 to `peak` over `warmup` steps, then constant: the schedule of DINOv3 pretraining."""
    return SHAPES[shape](step, start=0.0, end=peak, steps=warmup)


def warmup_cosine(step: int, *, peak: float, end: float, warmup: int, steps: int, shape: str = "linear") -> float:
    """From 0 to `peak` over `warmup` steps, then half a cosine to `end` at `steps`."""
    if step < warmup:
        return warmup_constant(step, peak=peak, warmup=warmup, shape=shape)
    return cosine(step - warmup, start=peak, end=end, steps=max(steps - warmup, 1))


def warmup_cooldown(
    step: int, *, peak: float, end: float, warmup: int, cooldown: int, steps: int, shape: str = "linear"
) -> float:
    """From 0 to `peak` over `warmup`, constant, then half a cosine to `end` over the last `cooldown` of `steps`."""
    if step < steps - cooldown:
        return warmup_constant(step, peak=peak, warmup=warmup, shape=shape)
    return cosine(step - (steps - cooldown), start=peak, end=end, steps=cooldown)


def scaled_learning_rate(lr: float, *, rule: str, batch_size: int) -> float:
    """The rate by rule: `sqrt_wrt_1024` lr * 4 * sqrt(batch / 1024), `linear_wrt_256` lr * batch / 256, `none` lr."""
    rules = {"sqrt_wrt_1024": 4.0 * math.sqrt(batch_size / 1024), "linear_wrt_256": batch_size / 256, "none": 1.0}
    if rule not in rules:
        raise ValueError(f"optimizer.lr_rule: expected one of {', '.join(rules)}, got {rule!r}")
    return lr * rules[rule]
