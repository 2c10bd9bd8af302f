"""Retrieval around trusted sets: the pool's images that are nearest to seed images, or share their clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import counter
from .cluster import Hierarchy
from .files import read_arrays, write_arrays
from .kmeans import InMemory, Points, Where, assign, blocks, draw_rows
from .nearest import fp32_products

METHODS = ("nearest", "clusters")
SEEDS = 65536  # seed images that share one pass over the pool
TILE = 2048  # seed images whose similarities are in memory at once


@dataclass(frozen=True, kw_only=True)
class RetrieveSettings:
    """How images are retrieved for a seed set.

    method: "nearest": `neighbours` of each seed image; at most `per_set` for the set: first every seed's nearest, then
    every second one, and so on. "clusters", for sets of few images: up to `per_cluster` images of every lowest cluster
    that holds `min_seeds` seeds or more, drawn at random. least_similarity: cosine below which nothing is retrieved.
    seed: of draws. Errors: ValueError for a value outside these.
    """

    method: str = "nearest"
    neighbours: int = 4
    per_set: int | None = None
    per_cluster: int = 10000
    min_seeds: int = 1
    least_similarity: float = -1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"retrieve: method expects one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("neighbours", "per_cluster", "min_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"retrieve: {name} expects at least 1, got {getattr(self, name)}")
        if self.per_set is not None and self.per_set < 1:
            raise ValueError(f"retrieve: per_set expects at least 1, got {self.per_set}")
        if not -1 <= self.least_similarity <= 1:
            raise ValueError(f"retrieve: least_similarity is a cosine, -1 to 1, got {self.least_similarity}")


@dataclass(frozen=True)
class Retrieved:
    """Images of the pool found for a seed set: rows int64 (m,), ascending; the seed of each, int64 (m,), as a row of
    the seed set; their cosine similarity, fp32 (m,)."""

    rows: np.ndarray
    seeds: np.ndarray
    similarity: np.ndarray

    def write(self, path: Path) -> None:
        """One .npz file, whole or absent."""
        write_arrays(path, rows=self.rows, seeds=self.seeds, similarity=self.similarity)

    @staticmethod
    def read(path: Path) -> Retrieved:
        """What `write` wrote. Errors: ValueError for a damaged file."""
        return Retrieved(**read_arrays(path))


def retrieve(
    pool: Points,
    seeds: Points,
    settings: RetrieveSettings,
    *,
    where: Where,
    hierarchy: Hierarchy | None = None,
    say: Callable[[str], None] = print,
) -> Retrieved:
    """Images of `pool` for the seed set `seeds`; an image that several seeds find counts for the one it is nearest to.

    Args:
        pool, seeds: embeddings of one backbone; rows need not have unit length.
        where: device and ranks; ranks share the pool, each holds the seeds.
        hierarchy: of the pool's rows, for the method "clusters".

    Errors: ValueError for different widths, a missing hierarchy, or one of another pool.
    """
    if pool.dim != seeds.dim:
        raise ValueError(f"retrieve: the pool has width {pool.dim}, the seeds {seeds.dim}; expected one backbone")
    if settings.method == "clusters":
        if hierarchy is None or len(hierarchy.labels[0]) != len(pool):
            raise ValueError("retrieve: method=clusters expects the clusters of this pool (clusters=FOLDER)")
        return _from_clusters(pool, seeds, settings, where, hierarchy, say)
    found = [
        _nearest(
            pool, _take(seeds, np.arange(first, min(first + SEEDS, len(seeds))), where), settings.neighbours, where
        )
        for first in range(0, len(seeds), SEEDS)
    ]
    similar = np.concatenate([part[0] for part in found])  # (S, neighbours), best first
    rows = np.concatenate([part[1] for part in found])
    seed, place = np.meshgrid(np.arange(len(rows)), np.arange(rows.shape[1]), indexing="ij")
    usable = (similar >= settings.least_similarity) & (rows >= 0)
    return _united(rows[usable], seed[usable], similar[usable], place[usable], settings.per_set)


def _united(rows: np.ndarray, seeds: np.ndarray, similar: np.ndarray, turn: np.ndarray, limit: int | None) -> Retrieved:
    """Each row once, for the seed it is most similar to; at most `limit`, in the order of turns, then similarity."""
    order = np.lexsort((seeds, -similar, rows))
    first = np.ones(len(order), dtype=bool)
    first[1:] = rows[order][1:] != rows[order][:-1]
    best = order[first]
    earliest = np.minimum.reduceat(turn[order], np.flatnonzero(first)) if len(order) else turn[:0]
    chosen = best[np.lexsort((rows[best], -similar[best], earliest))[:limit]]
    chosen = chosen[np.argsort(rows[chosen])]
    return Retrieved(rows[chosen], seeds[chosen], similar[chosen].astype(np.float32))


def _nearest(pool: Points, seeds: Tensor, neighbours: int, where: Where) -> tuple[np.ndarray, np.ndarray]:
    """Similarities fp32 and rows int64, (S, neighbours), best first, equals in the order of rows; -1: no such row."""
    best = torch.full((len(seeds), neighbours), -torch.inf, device=where.device)
    rows = torch.full((len(seeds), neighbours), -1, dtype=torch.int64, device=where.device)
    for first, block in blocks(pool, where):
        block = torch.nn.functional.normalize(block, dim=1)
        numbers = torch.arange(first, first + len(block), device=where.device)
        for start in range(0, len(seeds), TILE):
            tile = slice(start, start + TILE)
            with fp32_products():
                scores = seeds[tile] @ block.T  # (s, n)
            better = (scores.amax(dim=1) > best[tile, -1]).nonzero().flatten()
            if not len(better):
                continue
            place = start + better
            every = torch.cat([best[place], scores[better]], dim=1)
            named = torch.cat([rows[place], numbers.expand(len(better), -1)], dim=1)
            best[place], rows[place] = _first(every, named, neighbours)
    if where.collectives.world_size > 1:
        shape = (where.collectives.world_size, len(seeds), neighbours)
        best, rows = (
            where.collectives.all_gather(part).view(shape).transpose(0, 1).flatten(1) for part in (best, rows)
        )
        best, rows = _first(best, rows, neighbours)
    return best.cpu().numpy(), rows.cpu().numpy()


def _first(scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each line; of equals the one that stands first (earlier rows do)."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return scores.gather(1, order), rows.gather(1, order)


def _from_clusters(
    pool: Points,
    seeds: Points,
    settings: RetrieveSettings,
    where: Where,
    hierarchy: Hierarchy,
    say: Callable[[str], None],
) -> Retrieved:
    found = InMemory(seeds.take(np.arange(len(seeds))))
    alone = Where(where.device)
    labels, _ = assign(found, hierarchy.centroids(1), alone)  # (S,)
    counts = np.bincount(labels, minlength=len(hierarchy.sizes[0]))
    used = np.flatnonzero(counts >= settings.min_seeds)
    say(f"{len(used)} clusters hold {settings.min_seeds} or more of {len(seeds)} seeds")
    order = np.argsort(hierarchy.labels[0], kind="stable")
    starts = np.searchsorted(hierarchy.labels[0][order], np.arange(len(counts) + 1))
    parts = []
    for cluster in used:
        rows = order[starts[cluster] : starts[cluster + 1]]
        if len(rows) > settings.per_cluster:
            rows = rows[draw_rows(settings.seed, f"retrieve/{cluster}", settings.per_cluster, len(rows))]
        inside = np.flatnonzero(labels == cluster)
        mine, others = _take(pool, rows, where), _take(found, inside, where)
        with fp32_products():
            scores = mine @ others.T
        similar, place = scores.max(dim=1)
        parts.append((rows, inside[place.cpu().numpy()], similar.cpu().numpy()))
    rows, seed, similar = (np.concatenate(part) for part in zip(*parts)) if parts else (np.empty(0, np.int64),) * 3
    usable = similar >= settings.least_similarity
    rows, seed, similar = rows[usable], seed[usable], similar[usable]
    turn = np.argsort(np.argsort(counter.uniform(settings.seed, "retrieve/turn", rows, 1)[:, 0])) if len(rows) else rows
    return _united(rows, seed, similar, turn, settings.per_set)


def _take(points: Points, rows: np.ndarray, where: Where) -> Tensor:
    return torch.nn.functional.normalize(points.take(rows).to(where.device), dim=1)
