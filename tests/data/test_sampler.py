"""The order of images, and who takes which."""

from __future__ import annotations

import numpy as np
import pytest

from dinov3_train.data.sampler import BatchPlan, Sampler


def test_each_epoch_is_a_permutation_of_its_own():
    sampler = Sampler(37, seed=5)
    order = [sampler.image(index) for index in range(37 * 3)]
    epochs = [order[start : start + 37] for start in (0, 37, 74)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Sampler(37, seed=5).image(index) for index in (90, 3, 50, 3)] == [order[90], order[3], order[50], order[3]]
    assert [Sampler(37, seed=6).image(index) for index in range(37)] != epochs[0]


def test_skipping_goes_on_in_the_order_and_wraps():
    sampler = Sampler(10, seed=0)
    assert sampler.image(3, skip=4) == sampler.image(7)
    assert sampler.image(18, skip=3) == sampler.image(11)
    assert sorted(sampler.image(12, skip=skip) for skip in range(10)) == list(range(10))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_world_size_keeps_the_images_of_every_micro_batch(accumulate):
    for micro_batch in range(accumulate):
        one = BatchPlan(batch_size=12, accumulate=accumulate).indices(4, micro_batch)
        for world_size in (2, 4):
            plans = [
                BatchPlan(batch_size=12, rank=rank, world_size=world_size, accumulate=accumulate)
                for rank in range(world_size)
            ]
            parts = [plan.indices(4, micro_batch) for plan in plans]
            assert np.concatenate(parts).tolist() == one.tolist()
            assert [48 + plan.first(micro_batch) for plan in plans] == [part[0] for part in parts]
    every = [BatchPlan(batch_size=12, accumulate=accumulate).indices(4, m) for m in range(accumulate)]
    assert np.concatenate(every).tolist() == list(range(48, 60))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"batch_size": 10, "world_size": 4}, r"multiple of world_size \* accumulate = 4 \* 1, got 10"),
        ({"batch_size": 0}, "got 0"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size=2\), got 2"),
        ({"batch_size": 4, "accumulate": 0}, "got 4"),
    ],
)
def test_plans_that_do_not_divide(plan, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(**plan)


def test_an_empty_source_has_no_sampler():
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        Sampler(0, seed=0)
