"""Values, bootstrap intervals and groups against direct computation and scipy."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from dinov3_train.evaluation.measure import ProbeResult, Statistics, by_group, mean_of, measured, ratio_of
from dinov3_train.evaluation.summary import lines


def test_interval_is_scipys_percentile_bootstrap():
    values = torch.randn(60, generator=torch.Generator().manual_seed(1)).double()
    found = measured(mean_of(values), samples=10000)
    oracle = bootstrap(
        (values.numpy(),), np.mean, n_resamples=10000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    spread = float(values.std()) / math.sqrt(60)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.images == 60
    # two bootstraps of 10000 draws: their 2.5 % quantiles differ by 4 % of the spread, one standard deviation
    assert found.low == pytest.approx(oracle.low, abs=0.12 * spread)
    assert found.high == pytest.approx(oracle.high, abs=0.12 * spread)


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    inside = 0
    for trial in range(200):
        found = measured(mean_of(torch.rand(50, generator=generator)), samples=200, seed=trial)
        inside += found.low <= 0.5 <= found.high
    assert 0.88 <= inside / 200 <= 0.98  # 95 % up to the spread of 200 trials; the bootstrap of 50 is a little narrow


def test_the_same_seed_gives_the_same_interval():
    statistics = mean_of(torch.arange(9.0))
    assert measured(statistics, seed=4) == measured(statistics, seed=4)
    assert measured(statistics, seed=4) != measured(statistics, seed=5)


def test_ratio_weighs_parts_and_undefined_resamples_are_left_out():
    found = measured(ratio_of(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0])))
    assert found.value == found.low == found.high == 0.5  # resamples of the empty image alone are 0 / 0
    assert math.isnan(measured(ratio_of(torch.zeros(2), torch.zeros(2))).low)


def test_groups():
    values = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5])
    groups = by_group("accuracy", mean_of(values), ["a", "a", "b", "b", None])
    assert {name: score.value for name, score in groups.scores.items()} == {"a": 1.0, "b": 0.5}
    assert (groups.worst, groups.best, groups.gap, groups.without) == ("b", "a", 0.5, 1)
    assert by_group("error", mean_of(values), ["a", "a", "b", "b", None], higher_is_better=False).worst == "a"


def test_refusals():
    with pytest.raises(ValueError, match="at least one image, got none"):
        measured(mean_of(torch.empty(0)))
    with pytest.raises(ValueError, match=r"at least two groups of test images, got \['a'\]"):
        by_group("accuracy", mean_of(torch.ones(2)), ["a", None])
    with pytest.raises(ValueError, match="not defined in any of the 2 groups"):
        by_group("accuracy", ratio_of(torch.zeros(2), torch.zeros(2)), ["a", "b"])


def test_result_is_written_as_strict_json(tmp_path):
    statistics = Statistics(torch.ones(3, 1), lambda sums: sums[:, 0] / 3)
    result = ProbeResult(
        probe="any",
        metrics={"share": measured(statistics)},
        chance={"share": float("nan")},
        counts={"images": 3},
        settings={"view": (1, 2)},
        groups=by_group("share", mean_of(torch.ones(2)), ["a", "b"]),
    )

    def refuse(text):
        raise AssertionError(text)

    written = json.loads(result.write(tmp_path / "deep" / "any.json").read_text(), parse_constant=refuse)
    assert written["metrics"]["share"]["value"] == 1.0
    assert written["chance"]["share"] is None
    assert written["groups"]["gap"] == 0
    assert result.main.images == 3


def test_many_groups_are_cut_short():
    judged = mean_of(torch.arange(40.0))
    groups = by_group("score", judged, [f"{number // 2}" for number in range(40)])
    result = ProbeResult(
        probe="any", metrics={"score": measured(judged)}, chance={}, counts={}, settings={}, groups=groups
    )
    printed = list(lines(result))
    assert sum(line.startswith("group ") for line in printed) == 10
    assert printed[-1].startswith("20 groups: worst 0, best 19")
