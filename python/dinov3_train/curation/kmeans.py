"""k-means out of core: blocks of rows are read, assigned and summed; ranks share the blocks and add up the sums."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .. import counter
from .embeddings import Embeddings
from .nearest import Nearest, fp32_products
from .place import Place

ROWS = {"cpu": 2048, "cuda": 65536}  # rows of a block: on a CPU all that is made of one stays in the cache
FLUSH = 64  # blocks whose sums are fp32 before they are added up in fp64
START_ROUNDS = 128  # draws of k-means++, each of k / 128 centroids
START_SAMPLE = (1 << 16, 1 << 18)  # rows that k-means++ looks at: at least, and at most unless 4 k are more
SPLIT = 1.0 / 1024.0  # by how much the halves of a split cluster differ
STARTS = ("k-means++", "random")


class Points(Protocol):
    """Rows to cluster."""

    def __len__(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def take(self, rows: np.ndarray) -> Tensor:
        """fp32 (n, D) of ascending row numbers int64 (n,), on the CPU."""


@dataclass(frozen=True)
class Selected:
    """The rows `rows` (int64, ascending) of some embeddings, numbered from 0; None: all of them."""

    embeddings: Embeddings
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.embeddings) if self.rows is None else len(self.rows)

    @property
    def dim(self) -> int:
        return self.embeddings.dim

    def take(self, rows: np.ndarray) -> Tensor:
        return self.embeddings.take(rows if self.rows is None else self.rows[rows])


@dataclass(frozen=True)
class InMemory:
    """The rows of a tensor fp32 (n, D)."""

    tensor: Tensor

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def dim(self) -> int:
        return self.tensor.shape[1]

    def take(self, rows: np.ndarray) -> Tensor:
        return self.tensor[torch.from_numpy(rows)]


@dataclass(frozen=True)
class Where(Place):
    """Where the work is done, and who is told how far it is.

    progress: called with (rows done, rows of this rank) of one pass over the points.
    """

    progress: Callable[[int, int], None] = lambda done, total: None

    def span(self, count: int) -> range:
        """The rows of this rank: whole blocks, the same ones for any number of ranks."""
        rank, blocks = self.collectives.rank, -(-count // self.rows)
        edges = [min(count, self.rows * (blocks * r // self.collectives.world_size)) for r in (rank, rank + 1)]
        return range(*edges)

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return ROWS[self.device.type]


@dataclass(frozen=True)
class Sums:
    """What a pass over all points gives: sums fp64 (k, D), counts int64 (k,), sum of squared distances."""

    sums: Tensor
    counts: Tensor
    distortion: float


def start(points: Points, clusters: int, *, how: str, seed: int, stream: str) -> Tensor:
    """First centroids, fp32 (clusters, D), a function of (seed, stream) and the points; the same on every rank.

    how: "random": rows drawn without replacement. "k-means++": of a sample of rows (32 for each cluster, but at least
    65,536 and at most the larger of 262,144 and 4 for each cluster), each drawn with a probability proportional to its
    squared distance from the centroids so far (Arthur and Vassilvitskii, 2007), in at most 128 draws, so that beyond
    128 clusters several are drawn from one state of the distances.
    Errors: ValueError for more clusters than points, or another `how`.
    """
    if how not in STARTS:
        raise ValueError(f"cluster: start expects one of {', '.join(STARTS)}, got {how!r}")
    if not 1 <= clusters <= len(points):
        raise ValueError(f"cluster: k expects 1 to {len(points)}, the number of points, got {clusters}")
    if how == "random":
        return points.take(draw_rows(seed, stream, clusters, len(points)))
    least, most = START_SAMPLE
    count = min(len(points), max(4 * clusters, least, min(32 * clusters, most)))
    return _plus_plus(points.take(draw_rows(seed, stream, count, len(points))), clusters, seed, stream)


def draw_rows(seed: int, stream: str, count: int, size: int) -> np.ndarray:
    """`count` different numbers below `size`, ascending, int64, a function of the arguments."""
    if 2 * count >= size:
        return np.sort(counter.permutation(seed, stream, size)[:count])
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < count:  # the first `count` different ones of an endless sequence of draws
        total = 2 * max(count, len(drawn))
        sequence = (counter.uniform(seed, stream, np.arange(total), 1)[:, 0] * size).astype(np.int64)
        _, first = np.unique(sequence, return_index=True)
        drawn = sequence[np.sort(first)]
    return np.sort(drawn[:count])


def _plus_plus(sample: Tensor, clusters: int, seed: int, stream: str) -> Tensor:
    squares = sample.square().sum(dim=1)  # (m,)
    distances = torch.full((len(sample),), torch.inf)
    chosen = torch.zeros(len(sample), dtype=torch.bool)
    picks: list[Tensor] = []
    rounds = min(clusters, START_ROUNDS)
    for number in range(rounds):
        want = clusters * (number + 1) // rounds - clusters * number // rounds
        draws = torch.from_numpy(counter.uniform(seed, f"{stream}/{number}", np.arange(len(sample)), 1)[:, 0])
        # the first of exponential waiting times of rate d^2 is a draw with probability proportional to d^2
        times = -torch.log1p(-draws) / (distances.double() if number else torch.ones(()))
        times[distances == 0] = 1e300  # duplicates of a centroid, when nothing else is left
        times[chosen] = torch.inf
        new = times.topk(want, largest=False).indices
        chosen[new] = True
        picks.append(new)
        with fp32_products():
            found = (
                torch.addmm(sample[new].square().sum(dim=1), sample, sample[new].T, alpha=-2.0).amin(dim=1) + squares
            )
        found[found <= 1e-6 * squares] = 0.0  # rounding, not distance
        distances = torch.minimum(distances, found)
    return sample[torch.cat(picks)]


def blocks(points: Points, where: Where) -> Iterator[tuple[int, Tensor]]:
    """(first row, fp32 (n, D) on the device) of this rank's blocks."""
    span = where.span(len(points))
    for begin in range(span.start, span.stop, where.rows):
        stop = min(begin + where.rows, span.stop)
        yield begin, points.take(np.arange(begin, stop)).to(where.device)
        where.progress(stop - span.start, len(span))


def pass_over(points: Points, centroids: Tensor, where: Where) -> Sums:
    """Assign every point to its nearest centroid and sum them up, over all ranks."""
    nearest = Nearest(centroids.to(where.device))
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=where.device)
    counts = torch.zeros(len(centroids), dtype=torch.float64, device=where.device)
    squares = torch.zeros((), dtype=torch.float64, device=where.device)
    recent = torch.zeros_like(nearest.centroids)
    for number, (_, block) in enumerate(blocks(points, where)):
        labels = nearest.labels(block)
        recent.index_add_(0, labels, block)
        counts += torch.bincount(labels, minlength=len(counts))
        squares += torch.linalg.vector_norm(block, dim=1).square().sum(dtype=torch.float64)
        if number % FLUSH == FLUSH - 1:
            sums += recent
            recent.zero_()
    sums += recent
    sums, counts, squares = (where.collectives.all_reduce(part, "sum").cpu() for part in (sums, counts, squares))
    old = centroids.double()
    # sum |x - c|^2 = sum |x|^2 - 2 c . sum x + n |c|^2
    distortion = squares - 2.0 * (sums * old).sum() + (counts * old.square().sum(dim=1)).sum()
    return Sums(sums, counts.long(), max(0.0, float(distortion)))


def moved(found: Sums, centroids: Tensor) -> Tensor:
    """The next centroids, fp32 (k, D): means; an empty cluster takes half of the largest one.

    Of the cluster with the most points (halves counted as such, the lowest number of equals) both halves get its mean,
    moved apart by 1/1024 of each entry, in alternating directions.
    """
    counts = found.counts
    means = torch.where(counts[:, None] > 0, found.sums / counts.clamp(min=1)[:, None], centroids.double())  # (k, D)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty and len(empty) < len(counts):
        signs = torch.ones(means.shape[1], dtype=torch.float64)
        signs[1::2] = -1.0
        heap = [(-count, number) for number, count in enumerate(counts.tolist()) if count > 0]
        heapq.heapify(heap)
        for number in empty:
            negative, largest = heapq.heappop(heap)
            means[number] = means[largest] * (1.0 + SPLIT * signs)
            means[largest] = means[largest] * (1.0 - SPLIT * signs)
            heapq.heappush(heap, (negative / 2, largest))
            heapq.heappush(heap, (negative / 2, number))
    return means.float()


def kmeans(
    points: Points,
    centroids: Tensor,
    iterations: int,
    where: Where,
    *,
    done: int = 0,
    after: Callable[[int, Tensor, float], None] = lambda number, centroids, distortion: None,
) -> Tensor:
    """Lloyd's iterations `done` to `iterations`; `after(number done, centroids, distortion before)` each."""
    for number in range(done, iterations):
        found = pass_over(points, centroids, where)
        centroids = moved(found, centroids)
        after(number + 1, centroids, found.distortion)
    return centroids


def assign(points: Points, centroids: Tensor, where: Where) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 (n,) and squared distances fp32 (n,) of this rank's rows `where.span(len(points))`."""
    nearest = Nearest(centroids.to(where.device))
    span = where.span(len(points))
    labels, distances = np.empty(len(span), dtype=np.int32), np.empty(len(span), dtype=np.float32)
    for first, block in blocks(points, where):
        found = nearest.labels(block)
        place = slice(first - span.start, first - span.start + len(block))
        labels[place] = found.cpu().numpy()
        distances[place] = nearest.distances(block, found).cpu().numpy()
    return labels, distances


def closest_rows(points: Points, centroids: Tensor, each: int, where: Where) -> np.ndarray:
    """The rows, int64 ascending, that are among the `each` nearest of their centroid, over all ranks."""
    labels, distances = assign(points, centroids, where)
    rows = np.arange(len(labels)) + where.span(len(points)).start
    first = first_of_groups(labels, distances, each)
    if where.collectives.world_size > 1:
        mine = torch.full((len(centroids), each, 2), torch.inf, dtype=torch.float64)
        chosen = labels[first]
        place = np.arange(len(chosen)) - np.searchsorted(chosen, chosen)
        mine[chosen, place] = torch.from_numpy(np.stack([distances[first], rows[first]], axis=1).astype(np.float64))
        every = where.collectives.all_gather(mine.flatten(1).to(where.device)).cpu()
        every = every.view(where.collectives.world_size, len(centroids), each, 2).transpose(0, 1).flatten(1, 2).numpy()
        order = np.lexsort((every[..., 1], every[..., 0]))[:, :each]  # (k, each)
        picked = np.take_along_axis(every[..., 1], order, axis=1).ravel()
        return np.sort(picked[np.isfinite(picked)].astype(np.int64))
    return np.sort(rows[first])


def first_of_groups(groups: np.ndarray, values: np.ndarray, each: int) -> np.ndarray:
    """Places, int64, of the `each` smallest values of every group, ordered by group, then value, then place."""
    order = np.lexsort((values, groups))
    sorted_groups = groups[order]
    return order[np.arange(len(order)) - np.searchsorted(sorted_groups, sorted_groups) < each]
