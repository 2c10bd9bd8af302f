"""Which image is sample i: a pure function of (seed, i), so the order survives workers, ranks and restarts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import counter


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How the images of a step are dealt out: `batch_size` over all ranks and micro-batches, `rank` of `world_size`.

    Micro-batch m of `accumulate` covers positions [m, m + 1) * batch_size / accumulate of the step; within it each rank
    takes a contiguous slice. So another world size leaves the images of every micro-batch as they were.
    """

    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"BatchPlan: rank must lie in [0, world_size={self.world_size}), got {self.rank}")
        parts = self.world_size * self.accumulate
        if self.accumulate < 1 or self.batch_size < 1 or self.batch_size % parts:
            raise ValueError(
                f"BatchPlan: batch_size must be a positive multiple of world_size * accumulate = "
                f"{self.world_size} * {self.accumulate}, got {self.batch_size}"
            )

    @property
    def images(self) -> int:
        """Images of one rank in one micro-batch."""
        return self.batch_size // (self.world_size * self.accumulate)

    def first(self, micro_batch: int) -> int:
        """Position in the global batch of this rank's first image of `micro_batch`."""
        return (micro_batch * self.world_size + self.rank) * self.images

    def indices(self, step: int, micro_batch: int = 0) -> np.ndarray:
        """Global sample indices step * batch_size + position of this rank's images: int64 (images,)."""
        start = step * self.batch_size + self.first(micro_batch)
        return np.arange(start, start + self.images, dtype=np.int64)


class Sampler:
    """Image number of a global sample index i: permutation(seed, epoch)[i mod size], epoch = i div size.

    Keeps the permutations of the two epochs last asked for: a batch can straddle a border. `stream` sets the orders of
    several samplers of one seed apart.
    """

    def __init__(self, size: int, seed: int, stream: str = "epoch") -> None:
        if size < 1:
            raise ValueError(f"Sampler: size must be at least 1 image, got {size}")
        self.size = size
        self.seed = seed
        self._stream = stream
        self._orders: dict[int, np.ndarray] = {}

    def image(self, index: int, *, skip: int = 0) -> int:
        """The image of sample `index`, or `skip` entries further on in the same epoch's order, which wraps."""
        epoch, place = divmod(int(index), self.size)
        return int(self._order(epoch)[(place + skip) % self.size])

    def candidates(self, index: int) -> int:
        """How many different images `skip` reaches from sample `index`."""
        return self.size

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = counter.permutation(self.seed, f"{self._stream}/{epoch}", self.size)
        return self._orders[epoch]
