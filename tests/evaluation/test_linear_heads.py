"""Heads trained side by side are the heads that PyTorch trains one at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov3_train.evaluation.heads import Heads, HeadTraining, best_of, split, train_heads

FEATURES = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (50,), generator=torch.Generator().manual_seed(1))


def each_cross_entropy(logits, targets):
    return torch.stack([F.cross_entropy(one, targets) for one in logits])


def trained(settings, seen=None):
    def batch(numbers, epochs):
        if seen is not None:
            seen.append(numbers.tolist())
        return FEATURES[numbers], LABELS[numbers]

    return train_heads(batch, each_cross_entropy, images=50, shape=(3, 6), settings=settings)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_each_head_is_the_one_torch_trains_alone(optimizer, clip):
    settings = HeadTraining(
        learning_rates=(0.03, 0.3),
        weight_decays=(0.0, 0.1),
        optimizer=optimizer,
        steps=25,
        batch_size=16,
        warmup=5,
        clip=clip,
    )
    seen = []
    heads = trained(settings, seen)
    for number, (rate, decay) in enumerate(settings.grid):
        layer = nn.Linear(6, 3)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
        more = {"momentum": 0.9} if optimizer == "sgd" else {}
        tool = kind(layer.parameters(), lr=rate, weight_decay=decay, **more)
        for step, numbers in enumerate(seen):
            tool.param_groups[0]["lr"] = rate * settings.factor(step)
            tool.zero_grad()
            F.cross_entropy(layer(FEATURES[numbers]), LABELS[numbers]).backward()
            if clip:
                nn.utils.clip_grad_norm_(layer.parameters(), clip)
            tool.step()
        torch.testing.assert_close(heads.weight[number], layer.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.bias[number], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_every_image_comes_once_before_any_comes_again():
    seen, epochs = [], []

    def batch(numbers, counted):
        seen.append(numbers.tolist())
        epochs.extend(counted.tolist())
        return FEATURES[numbers], LABELS[numbers]

    settings = HeadTraining(learning_rates=(0.1,), steps=25, batch_size=4)
    train_heads(batch, each_cross_entropy, images=50, shape=(3, 6), settings=settings)
    assert epochs == [0] * 50 + [1] * 50
    order = [number for numbers in seen for number in numbers]
    assert sorted(order[:50]) == sorted(order[50:100]) == list(range(50))
    assert order[:50] != order[50:100]


def test_heads_of_any_leading_shape():
    heads = Heads(torch.randn(2, 3, 6), torch.randn(2, 3))
    features = torch.randn(4, 5, 6)
    expected = torch.stack([features @ w.T + b for w, b in zip(heads.weight, heads.bias)])
    torch.testing.assert_close(heads(features), expected)
    torch.testing.assert_close(heads.one(1)(features), expected[1:])


def test_schedule():
    settings = HeadTraining(learning_rates=(1.0,), steps=10, warmup=4)
    factors = [settings.factor(step) for step in range(10)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[7] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    constant = HeadTraining(learning_rates=(1.0,), steps=10, schedule="constant")
    assert [constant.factor(step) for step in (0, 9)] == [1.0, 1.0]


def test_dropout_is_a_function_of_the_seed():
    one, same, other = (
        trained(HeadTraining(learning_rates=(0.1,), steps=9, dropout=0.5, seed=seed)).weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_split_and_best():
    kept, held_out = split(10, 0.3, seed=0)
    assert sorted(kept.tolist() + held_out.tolist()) == list(range(10))
    assert len(held_out) == 3
    assert len(split(2, 0.01, seed=0)[1]) == 1
    assert best_of([0.1, float("nan"), 0.3, 0.3]) == 2
    with pytest.raises(ValueError, match="at least two images"):
        split(1, 0.5, seed=0)


def test_refusals():
    for wrong, message in (
        ({"learning_rates": ()}, "learning_rates: expected numbers above 0"),
        ({"learning_rates": (0.0,)}, "learning_rates: expected numbers above 0"),
        ({"weight_decays": (-1.0,)}, "weight_decays: expected numbers of at least 0"),
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adamw, got 'lion'"),
        ({"schedule": "step"}, "schedule: expected one of cosine, constant"),
        ({"steps": 0}, "steps, batch_size"),
        ({"warmup": 1000}, "warmup: expected from 0 to below steps"),
        ({"betas": (0.9,)}, "betas: expected two numbers"),
        ({"dropout": 1.0}, r"dropout: expected a share in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadTraining(**{"learning_rates": (0.1,), **wrong})
    with pytest.raises(ValueError, match="no learning rate of .* finite loss"):
        train_heads(
            lambda numbers, epochs: (FEATURES[numbers] * float("nan"), LABELS[numbers]),
            each_cross_entropy,
            images=50,
            shape=(3, 6),
            settings=HeadTraining(learning_rates=(0.1,), steps=2),
        )
