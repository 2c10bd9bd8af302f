"""Which ranks train which student: consecutive groups, sized so that their steps take equally long."""

from __future__ import annotations

from collections.abc import Sequence


def group_sizes(costs: Sequence[float], *, ranks: int, batch_size: int) -> tuple[int, ...]:
    """Ranks of each student, so that the slowest group is as fast as can be.

    minimise max_i costs[i] / size_i   with sum size_i = ranks and every size a divisor of the batch

    Args:
        costs: of a step of each student, any unit.
        ranks: of the whole world, at least one per student.
        batch_size: images; every group trains on all of them, in equal shares.

    Errors: ValueError where no such sizes exist.
    """
    divisors = [size for size in range(1, ranks + 1) if batch_size % size == 0]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # ranks used -> (slowest group, sizes)
    for cost in costs:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (slowest, sizes) in best.items():
            for size in divisors:
                entry = (max(slowest, cost / size), (*sizes, size))
                if used + size <= ranks and entry < reached.get(used + size, (float("inf"), ())):
                    reached[used + size] = entry
        best = reached
    if ranks not in best:
        raise ValueError(
            f"distillation.groups: {ranks} ranks cannot be split among {len(costs)} students into groups that divide "
            f"run.batch_size={batch_size}; expected a batch with more divisors, or another number of ranks"
        )
    return best[ranks][1]


def check_groups(sizes: Sequence[int], *, students: Sequence[str], ranks: int, batch_size: int) -> None:
    """Errors: ValueError for group sizes that do not fit the students, the world or the batch."""
    if len(sizes) != len(students):
        raise ValueError(
            f"distillation.groups: expected one size for each of the {len(students)} students, got {list(sizes)}"
        )
    for student, size in zip(students, sizes):
        if not 1 <= size <= ranks:
            raise ValueError(
                f"distillation.groups: the group of {student} has {size} ranks, expected 1 to the world's {ranks}"
            )
        if batch_size % size:
            raise ValueError(
                f"distillation.groups: the group of {student} has {size} ranks, expected a divisor of "
                f"run.batch_size={batch_size}"
            )
    if sum(sizes) != ranks:
        raise ValueError(
            f"distillation.groups: expected sizes that add up to the world's {ranks} ranks, "
            f"got {list(sizes)}, together {sum(sizes)}"
        )
