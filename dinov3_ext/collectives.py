"""What an op may ask of the other ranks, handed to it by the caller: this floor never imports torch.distributed."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Collectives:
    """The exchanges between ranks that losses and ops are given.

    Args:
        all_reduce: `(tensor (...), op)` with op `"sum"` or `"max"` -> tensor (...), the same on every rank. Not
            differentiable. It may reuse the storage of its argument: go on with what it returns.
        all_gather: `(tensor (n, ...))` -> (world_size * n, ...) in rank order; n is the same on every rank.
            Differentiable: the gradient of a rank's rows is summed over the ranks that used them.
        rank: number of this rank, 0 to world_size - 1.
        world_size: number of ranks.
    """

    all_reduce: Callable[[Tensor, str], Tensor]
    all_gather: Callable[[Tensor], Tensor]
    rank: int = 0
    world_size: int = 1


def _same(tensor: Tensor, op: str = "sum") -> Tensor:
    return tensor


ALONE = Collectives(all_reduce=_same, all_gather=_same)
"""One rank: both exchanges are the identity."""
