"""Schedules: the effective rates of the paper's stages, warm-up, cosine ends, cool-down."""

import math

import pytest

from dinov3_train.schedule import (
    cosine,
    linear,
    scaled_learning_rate,
    warmup_constant,
    warmup_cooldown,
    warmup_cosine,
)


@pytest.mark.parametrize(
    ("lr", "batch_size", "effective"),
    [
        (5e-5, 4096, 4.0e-4),  # 7B pretraining
        (3e-5, 4096, 2.4e-4),  # Gram refinement
        (1.25e-5, 2048, 7.07e-5),  # high resolution
        (1e-3, 2048, 5.66e-3),  # ViT-L on ImageNet-1k
    ],
)
def test_effective_rates_of_the_stages(lr, batch_size, effective):
    assert float(f"{scaled_learning_rate(lr, rule='sqrt_wrt_1024', batch_size=batch_size):.3g}") == effective


def test_rules():
    assert scaled_learning_rate(1.0, rule="sqrt_wrt_1024", batch_size=64) == 1.0  # lr * sqrt(batch / 64)
    assert scaled_learning_rate(1.0, rule="linear_wrt_256", batch_size=512) == 2.0
    assert scaled_learning_rate(1.0, rule="none", batch_size=3) == 1.0
    with pytest.raises(ValueError, match="lr_rule.*sqrt_wrt_1024, linear_wrt_256, none.*'sqrt'"):
        scaled_learning_rate(1.0, rule="sqrt", batch_size=64)


def test_linear_and_cosine_reach_their_ends():
    assert [linear(step, start=0.04, end=0.07, steps=30) for step in (0, 30, 10**9)] == [0.04, 0.07, 0.07]
    assert linear(10, start=0.0, end=3.0, steps=30) == 1.0
    assert [cosine(step, start=1.0, end=0.25, steps=8) for step in (0, 8, 9)] == [1.0, 0.25, 0.25]
    assert cosine(4, start=1.0, end=0.0, steps=8) == pytest.approx(0.5)
    assert cosine(2, start=1.0, end=0.0, steps=8) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    rising = [cosine(step, start=0.992, end=1.0, steps=100) for step in range(101)]
    assert rising == sorted(rising)
    assert rising[-1] == 1.0


def test_without_a_length_the_end_holds_from_the_start():
    assert linear(0, start=0.04, end=0.07, steps=0) == 0.07
    assert warmup_constant(0, peak=2.0, warmup=0) == 2.0
    assert warmup_cosine(0, peak=2.0, end=0.0, warmup=0, steps=10) == 2.0


def test_warmup_constant():
    assert [warmup_constant(step, peak=4.0, warmup=4) for step in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]


def test_warmup_cosine():
    values = [warmup_cosine(step, peak=1.0, end=0.1, warmup=5, steps=25) for step in range(30)]
    assert values[:6] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert values[5:26] == sorted(values[5:26], reverse=True)
    assert values[15] == pytest.approx(0.55)
    assert values[25:] == [0.1] * 5


def test_warmup_cooldown():
    values = [warmup_cooldown(step, peak=1.0, end=0.0, warmup=2, cooldown=4, steps=10) for step in range(11)]
    assert values[:7] == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert values[8] == pytest.approx(0.5)
    assert values[10] == 0.0
    assert values[6:] == sorted(values[6:], reverse=True)


def test_a_cosine_warmup_rises_slowly_first_and_ends_at_the_peak():
    rising = [warmup_constant(step, peak=4.0, warmup=4, shape="cosine") for step in range(6)]
    assert rising == pytest.approx(
        [0.0, 4 * (1 - math.cos(math.pi / 4)) / 2, 2.0, 4 * (1 + math.sqrt(0.5)) / 2, 4.0, 4.0]
    )
    assert warmup_cosine(1, peak=4.0, end=0.0, warmup=4, steps=9, shape="cosine") == rising[1]
    assert warmup_cooldown(1, peak=4.0, end=0.0, warmup=4, cooldown=2, steps=9, shape="cosine") == rising[1]
