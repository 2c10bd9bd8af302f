"""Balanced sampling down a hierarchy of clusters: every branch gives as much as the cap lets it."""

from __future__ import annotations

import numpy as np

from .. import counter
from .cluster import Hierarchy

METHODS = ("random", "closest")


def balanced_sample(
    hierarchy: Hierarchy, target: int, *, method: str = "random", seed: int = 0, taken: np.ndarray | None = None
) -> np.ndarray:
    """Rows int64 (target,), ascending, spread evenly over the top clusters, within each over its clusters, and so on.

    On each level a cluster's share is divided by a cap c with sum over children of min(c, size) = share (`shares`).

    Args:
        hierarchy: of the rows.
        target: images wanted, 1 to the number of rows that may be drawn.
        method: "random", or "closest" to the centroid of the lowest level.
        seed: of the draws.
        taken: bool (rows,), rows that are not drawn again (they do not count as their clusters' share).

    Errors: ValueError for a target outside the rows, or another method.
    """
    if method not in METHODS:
        raise ValueError(f"sample: method expects one of {', '.join(METHODS)}, got {method!r}")
    free = np.ones(len(hierarchy.labels[0]), dtype=bool) if taken is None else ~taken
    if not 1 <= target <= free.sum():
        raise ValueError(f"sample: target expects 1 to {free.sum()}, the images there are, got {target}")
    sizes = [np.bincount(hierarchy.labels[0][free], minlength=len(hierarchy.sizes[0]))]
    for labels, total in zip(hierarchy.labels[1:], hierarchy.sizes[1:]):
        sizes.append(np.bincount(labels, weights=sizes[-1], minlength=len(total)).astype(np.int64))
    wanted = shares(sizes[-1], target, seed, f"level {hierarchy.levels}")  # (k_top,)
    for level in range(hierarchy.levels - 1, 0, -1):
        below = np.zeros(len(sizes[level - 1]), dtype=np.int64)
        for parent, children in _groups(hierarchy.labels[level]):
            below[children] = shares(sizes[level - 1][children], int(wanted[parent]), seed, f"level {level}/{parent}")
        wanted = below
    return _leaves(hierarchy, wanted, np.flatnonzero(free), method, seed)


def shares(sizes: np.ndarray, target: int, seed: int, stream: str) -> np.ndarray:
    """int64 (n,): min(c, size) with the largest whole cap c, found by bisection, whose sum does not exceed `target`;
    what is left goes one each to clusters that have more, in an order drawn from (seed, stream)."""
    low, high = 0, int(sizes.max(initial=0))  # the sum at `low` never exceeds the target
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= target else (low, middle - 1)
    found = np.minimum(sizes, low).astype(np.int64)
    left = target - int(found.sum())
    if left:
        larger = np.flatnonzero(sizes > low)
        found[larger[np.argsort(counter.uniform(seed, f"sample/{stream}", larger, 1)[:, 0], kind="stable")][:left]] += 1
    return found


def random_sample(rows: int, target: int, *, seed: int = 0) -> np.ndarray:
    """Rows int64 (target,), ascending, drawn without regard to clusters: the raw pool in small."""
    if not 1 <= target <= rows:
        raise ValueError(f"sample: target expects 1 to {rows}, the images there are, got {target}")
    return np.sort(counter.permutation(seed, "sample/raw", rows)[:target])


def _groups(labels: np.ndarray):
    """(label, places with it) in ascending order."""
    order = np.argsort(labels, kind="stable")
    borders = np.flatnonzero(np.diff(labels[order])) + 1
    for places in np.split(order, borders):
        yield int(labels[places[0]]), places


def _leaves(hierarchy: Hierarchy, wanted: np.ndarray, rows: np.ndarray, method: str, seed: int) -> np.ndarray:
    """The first `wanted[c]` rows of each lowest cluster c, in the order of the method."""
    labels = hierarchy.labels[0][rows]
    by = hierarchy.distances[rows] if method == "closest" else counter.uniform(seed, "sample/image", rows, 1)[:, 0]
    order = np.lexsort((by, labels))
    sorted_labels = labels[order]
    place = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.sort(rows[order[place < wanted[sorted_labels]]])
