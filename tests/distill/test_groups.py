"""Groups of ranks by cost: the best split there is, and what cannot be split."""

import itertools

import pytest

from dinov3_train.distill.groups import check_groups, group_sizes


@pytest.mark.parametrize(
    ("costs", "ranks", "batch_size"),
    [((1.0, 1.0), 2, 8), ((1.0, 3.0), 8, 16), ((1.0, 2.0, 5.0), 9, 24), ((4.0, 1.0, 1.0, 2.0), 12, 60)],
)
def test_no_other_split_is_faster(costs, ranks, batch_size):
    found = group_sizes(costs, ranks=ranks, batch_size=batch_size)
    divisors = [size for size in range(1, ranks + 1) if batch_size % size == 0]
    splits = [each for each in itertools.product(divisors, repeat=len(costs)) if sum(each) == ranks]
    assert found in splits
    assert max(c / n for c, n in zip(costs, found)) == min(max(c / n for c, n in zip(costs, each)) for each in splits)


def test_the_published_job():
    """ViT-S, S+, B, L on 296 ranks with a batch of 1920: 48, 48, 80, 120 there, by hand; by cost it balances better."""
    costs = (12.0, 16.0, 47.0, 163.0)  # GFLOPs at 256 px (spec 10.3)
    found = group_sizes(costs, ranks=296, batch_size=1920)
    assert sum(found) == 296
    slowest = max(cost / size for cost, size in zip(costs, found))
    assert slowest <= max(cost / size for cost, size in zip(costs, (48, 48, 80, 120)))


def test_ranks_that_cannot_be_split():
    with pytest.raises(ValueError, match=r"7 ranks cannot be split among 2 students.*run.batch_size=8"):
        group_sizes((1.0, 1.0), ranks=7, batch_size=8)  # 1, 2 and 4 add up to no 7


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2,), r"one size for each of the 2 students, got \[2\]"),
        ((5, 1), r"the group of a has 5 ranks, expected 1 to the world's 4"),
        ((0, 4), r"the group of a has 0 ranks"),
        ((3, 1), r"the group of a has 3 ranks, expected a divisor of run.batch_size=8"),
        ((1, 2), r"add up to the world's 4 ranks, got \[1, 2\], together 3"),
    ],
)
def test_groups_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_groups(sizes, students=("a", "b"), ranks=4, batch_size=8)
    check_groups((2, 2), students=("a", "b"), ranks=4, batch_size=8)
