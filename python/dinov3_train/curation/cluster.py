"""Hierarchical k-means: images, then centroids, then centroids of centroids; every iteration is kept for a restart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import claim, read_array, read_arrays, read_json, write_array, write_arrays, write_json
from .kmeans import STARTS, InMemory, Points, Where, assign, closest_rows, kmeans, start


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """A hierarchy.

    clusters: number of each level, of images first, such as (2000, 100). iterations: of Lloyd's, per level.
    resampling: rounds that take the `nearest` points of each centroid, cluster those anew (`start`, `iterations`)
    and go on from the centroids found: a point of a crowded region counts no more than one of an empty region, so
    that rare things get clusters of their own. start: "k-means++" or "random". seed: of every draw.
    Errors: ValueError for a value outside these.
    """

    clusters: tuple[int, ...]
    iterations: int = 50
    resampling: int = 10
    nearest: int = 10
    start: str = "k-means++"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.clusters or any(k < 1 for k in self.clusters):
            raise ValueError(f"cluster: clusters expects one positive number a level, got {self.clusters}")
        if any(above >= below for below, above in zip(self.clusters, self.clusters[1:])):
            raise ValueError(f"cluster: clusters expects fewer on each level than below, got {self.clusters}")
        for name, least in (("iterations", 1), ("resampling", 0), ("nearest", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"cluster: {name} expects at least {least}, got {getattr(self, name)}")
        if self.start not in STARTS:
            raise ValueError(f"cluster: start expects one of {', '.join(STARTS)}, got {self.start!r}")


Say = Callable[[str], None]


def cluster(
    points: Points, settings: ClusterSettings, out: Path, *, where: Where, about: dict | None = None, say: Say = print
) -> Hierarchy:
    """Cluster `points` level by level into the folder `out`; the same call goes on where an earlier one ended.

    Args:
        points: rows of embeddings; only blocks of them are in memory.
        out: new, empty, or of this very call.
        where: device and ranks. The result does not depend on the number of ranks but for the order of sums.
        about: further settings that must be the same for a restart (which embeddings, which rows).
        say: told each iteration.

    Returns the hierarchy. Clusters that stay empty (more clusters than different points) are left out, and it is said.
    Errors: ValueError for more clusters than points, rows that are NaN, another call's folder; OSError for a full disk.
    """
    if settings.clusters[0] > len(points):
        raise ValueError(
            f"cluster: {settings.clusters[0]} clusters of {len(points)} points; expected no more clusters than points"
        )
    if where.first:
        claim(out, asdict(settings) | (about or {}) | {"points": len(points)}, "cluster")
    where.meet()
    for level, clusters in enumerate(settings.clusters, start=1):
        if _level_file(out, "labels", level).is_file():
            points = InMemory(torch.from_numpy(read_array(_level_file(out, "centroids", level))))
            continue
        if clusters > len(points):
            say(f"level {level}: {clusters} clusters asked, {len(points)} points are left of the level below: as many")
        centroids = _Level(
            points, replace(settings, clusters=(min(clusters, len(points)),)), out, level, where, say
        ).run()
        points = InMemory(centroids)
    return Hierarchy(out)


@dataclass(frozen=True)
class _Level:
    """One level: `settings.clusters` has one entry, its number of clusters."""

    points: Points
    settings: ClusterSettings
    out: Path
    level: int
    where: Where
    say: Say

    def run(self) -> Tensor:
        """Write centroids, labels and distances of the level; returns the centroids fp32 (k, D)."""
        settings, k = self.settings, self.settings.clusters[0]
        round_, done, centroids = self._restart()
        if centroids is None:
            centroids = start(self.points, k, how=settings.start, seed=settings.seed, stream=f"level {self.level}")
        centroids = self._iterate(centroids, round_, done)
        for number in range(round_ + 1, settings.resampling + 1):
            centroids = self._iterate(self._resampled(centroids, number), number, 0)
        return self._finish(centroids)

    def _iterate(self, centroids: Tensor, round_: int, done: int) -> Tensor:
        """Lloyd's iterations over all points: all of them before resampling, none in a round of it."""
        total = self.settings.iterations if round_ == 0 else 0

        def after(number: int, centroids: Tensor, distortion: float) -> None:
            self.say(
                f"level {self.level}, {len(centroids)} clusters, iteration {number} of {total}: "
                f"mean squared distance {distortion / len(self.points):.5f}"
            )
            self._keep(round_, number, centroids)

        return kmeans(self.points, centroids, total, self.where, done=done, after=after)

    def _resampled(self, centroids: Tensor, number: int) -> Tensor:
        """Centroids of the points nearest to `centroids`, clustered on their own."""
        settings = self.settings
        rows = closest_rows(self.points, centroids, settings.nearest, self.where)
        sample = InMemory(self.points.take(rows))
        k = min(len(centroids), len(sample))
        stream = f"level {self.level} resampling {number}"
        centroids = start(sample, k, how=settings.start, seed=settings.seed, stream=stream)
        centroids = kmeans(sample, centroids, settings.iterations, replace(self.where, progress=lambda *_: None))
        self.say(
            f"level {self.level}, resampling {number} of {settings.resampling}: {len(sample)} points near centroids"
        )
        self._keep(number, 0, centroids)
        return centroids

    def _finish(self, centroids: Tensor) -> Tensor:
        """Assign all points; every rank writes its part, the first one puts them together."""
        labels, distances = assign(self.points, centroids, self.where)
        here = self.where.collectives
        counts = torch.from_numpy(np.bincount(labels, minlength=len(centroids)))
        counts = here.all_reduce(counts.to(self.where.device), "sum").cpu().numpy()
        kept = np.flatnonzero(counts)
        if len(kept) < len(counts):
            self.say(
                f"level {self.level}: {len(counts) - len(kept)} of {len(counts)} clusters are empty and left out "
                "(fewer different points than clusters)"
            )
        labels = np.searchsorted(kept, labels).astype(np.int32)
        write_arrays(self._part(here.rank), labels=labels, distances=distances)
        self.where.meet()
        if here.rank == 0:
            parts = [read_arrays(self._part(rank)) for rank in range(here.world_size)]
            write_array(_level_file(self.out, "centroids", self.level), centroids[torch.from_numpy(kept)].numpy())
            write_array(
                _level_file(self.out, "distances", self.level), np.concatenate([part["distances"] for part in parts])
            )
            write_array(_level_file(self.out, "labels", self.level), np.concatenate([part["labels"] for part in parts]))
            for rank in range(here.world_size):
                self._part(rank).unlink()
            self._state.unlink(missing_ok=True)
        self.where.meet()
        return centroids[torch.from_numpy(kept)]

    @property
    def _state(self) -> Path:
        return self.out / "state.npz"

    def _part(self, rank: int) -> Path:
        return self.out / f"level_{self.level}_rank_{rank}.npz"

    def _keep(self, round_: int, done: int, centroids: Tensor) -> None:
        if self.where.first:
            place = np.array([self.level, round_, done])
            write_arrays(self._state, place=place, centroids=centroids.numpy())
        self.where.meet()

    def _restart(self) -> tuple[int, int, Tensor | None]:
        """(round, iterations done, centroids) of an earlier call, (0, 0, None) at the beginning."""
        if not self._state.is_file():
            return 0, 0, None
        found = read_arrays(self._state)
        level, round_, done = found["place"].tolist()
        if level != self.level:
            return 0, 0, None
        self.say(f"level {level} goes on after {'iteration ' + str(done) if round_ == 0 else f'resampling {round_}'}")
        return round_, done, torch.from_numpy(found["centroids"])


class Hierarchy:
    """A finished clustering. Level 1 holds images, the last level is the top.

    labels[l]: int32, cluster on level l + 1 of each point of level l (of each row that was clustered for l = 0).
    sizes[l]: int64, images below each cluster of level l + 1. distances: fp32, squared, of each row to its centroid.
    Errors: ValueError for a folder without a finished clustering, or with files that do not agree.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "settings.json").is_file():
            raise ValueError(f"curate: {self.path} holds no clusters (dinov3 curate cluster)")
        self.settings = read_json(self.path / "settings.json")
        levels = len(self.settings.get("clusters", []))
        if not levels or not _level_file(self.path, "labels", levels).is_file():
            raise ValueError(f"curate: the clustering in {self.path} is not finished; the same command goes on")
        self.labels = [read_array(_level_file(self.path, "labels", level)) for level in range(1, levels + 1)]
        self.distances = read_array(_level_file(self.path, "distances", 1))
        self.sizes: list[np.ndarray] = []
        below = np.ones(len(self.labels[0]), dtype=np.int64)
        for labels, above in zip(self.labels, [*self.labels[1:], None]):
            count = int(labels.max()) + 1 if above is None else len(above)
            if len(labels) != len(below) or labels.max() >= count:
                raise ValueError(f"curate: the labels in {self.path} do not agree with each other; cluster again")
            below = np.bincount(labels, weights=below, minlength=count).astype(np.int64)
            self.sizes.append(below)

    @property
    def levels(self) -> int:
        return len(self.labels)

    def centroids(self, level: int) -> Tensor:
        """fp32 (k, D) of level 1, 2, ..."""
        return torch.from_numpy(read_array(_level_file(self.path, "centroids", level)))

    def paths(self, rows: np.ndarray) -> np.ndarray:
        """int32 (n, levels): clusters of rows, the top level first."""
        found, place = [], rows
        for labels in self.labels:
            place = labels[place]
            found.append(place)
        return np.stack(found[::-1], axis=1)


def _level_file(out: Path, what: str, level: int) -> Path:
    return out / f"level_{level}_{what}.npy"


def write_summary(hierarchy: Hierarchy) -> None:
    """`summary.json`: how many clusters each level has, and the spread of their sizes in images."""
    levels = []
    for number, sizes in enumerate(hierarchy.sizes, start=1):
        quantiles = np.quantile(sizes, (0.0, 0.1, 0.5, 0.9, 1.0)).round().astype(int).tolist()
        levels.append({"level": number, "clusters": len(sizes), "smallest_10%_median_90%_largest": quantiles})
    write_json(hierarchy.path / "summary.json", {"images": len(hierarchy.labels[0]), "levels": levels})


def parse_clusters(text: str) -> Sequence[int]:
    """`2000,100` as (2000, 100)."""
    return tuple(int(part) for part in text.split(","))
