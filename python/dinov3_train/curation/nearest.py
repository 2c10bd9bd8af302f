"""The nearest centroid of many points: products in bf16 find it, fp32 decides wherever bf16 cannot be sure."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache

import torch
from torch import Tensor

COLUMNS = 16384  # centroids of a tile
ENTRIES = 1 << 21  # scores of a tile: 8 MiB, which stay in the cache between the product and its maximum
FEW = 512  # centroids below which finding the runner-up costs more than bf16 products gain
FP32_SLACK = 2.0**-20  # of |x| |c|: what sums in fp32 lose (measured 3e-7 of the norms at width 384), twice over
_TURN = threading.RLock()  # for the precision of products


class Nearest:
    """Nearest centroid by Euclidean distance: argmax over c of x.c - |c|^2 / 2.

    Where the hardware multiplies bf16 faster (AMX, tensor cores), scores come from products of x and c rounded to
    bf16. With x' and c' the rounded ones, x.c - x'.c' = (x - x').c + x'.(c - c'), so no score is off by more than
    |x - x'| max|c| + |x'| max|c - c'|. A row whose best score leads by less than twice that is computed again in fp32.
    So the answer is that of fp32 products, ties and near ties included.

    centroids: fp32 (k, D) on the device to use.
    """

    def __init__(self, centroids: Tensor) -> None:
        self.centroids = centroids
        bias = centroids.square().sum(dim=1, keepdim=True).mul_(-0.5)  # (k, 1)
        high = bias.bfloat16().float()
        # the bias rides along as two columns, bias = high + low: adding it afterwards costs half a product
        self._columns = torch.cat([centroids, high, bias - high], dim=1)  # (k, D + 2)
        low_error = float((bias - high - (bias - high).bfloat16().float()).abs().max())
        self._norm = float(centroids.norm(dim=1).max())
        self._rounding = float((centroids - centroids.bfloat16().float()).norm(dim=1).max()) + FP32_SLACK * self._norm
        self._constant = low_error + FP32_SLACK * self._norm**2
        self._coarse = len(centroids) >= FEW and bf16_products_are_rounded(centroids.device.type)
        self._buffer = centroids.new_empty(0)

    def labels(self, points: Tensor) -> Tensor:
        """int64 (n,): number of the nearest centroid, the lowest of equals. points: fp32 (n, D), finite."""
        rows = max(1, ENTRIES // min(len(self.centroids), COLUMNS))
        found = [self._tile(part) for part in points.split(rows)] if len(points) else []
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=points.device)

    def distances(self, points: Tensor, labels: Tensor) -> Tensor:
        """fp32 (n,): squared distance to the labelled centroid, from differences, so that equal points give 0."""
        return (points - self.centroids[labels]).square_().sum(dim=1)

    def _tile(self, points: Tensor) -> Tensor:
        points_and_ones = torch.nn.functional.pad(points, (0, 2), value=1.0)  # (n, D + 2)
        if not self._coarse:
            with fp32_products():
                return self._best(points_and_ones)[0]
        with bf16_products():
            labels, lead = self._best(points_and_ones, runner_up=True)
        rounded = points.bfloat16().float()
        norms, errors = (torch.linalg.vector_norm(part, dim=1) for part in (rounded, points - rounded))
        limit = errors.mul_(self._norm).add_(norms, alpha=self._rounding).add_(self._constant)  # (n,)
        unsure = (lead <= 2.0 * limit).nonzero().flatten()
        if len(unsure):
            with fp32_products():
                labels[unsure] = self._best(points_and_ones[unsure])[0]
        return labels

    def _best(self, points: Tensor, *, runner_up: bool = False) -> tuple[Tensor, Tensor]:
        """Labels int64 (n,) and, if asked, by how much the best score leads, fp32 (n,). points: (n, D + 2)."""
        labels = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        best = points.new_full((len(points),), -torch.inf)
        second = best.clone()
        for start in range(0, len(self._columns), COLUMNS):
            block = self._columns[start : start + COLUMNS]
            scores = self._scratch(len(points), len(block))
            torch.mm(points, block.T, out=scores)
            place = argmax(scores)  # (n,)
            value = scores.gather(1, place[:, None]).flatten()
            if runner_up:
                scores.scatter_(1, place[:, None], -torch.inf)
                other = scores.gather(1, argmax(scores)[:, None]).flatten()
                second = torch.maximum(torch.maximum(second, other), torch.minimum(best, value))
            labels = torch.where(value > best, place + start, labels)
            best = torch.maximum(best, value)
        return labels, best - second

    def _scratch(self, rows: int, columns: int) -> Tensor:
        """Memory that is used again: fresh pages cost twice the product of a tile."""
        if self._buffer.numel() < rows * columns:
            self._buffer = self.centroids.new_empty(rows * columns)
        return self._buffer[: rows * columns].view(rows, columns)


def argmax(scores: Tensor) -> Tensor:
    """int64 (n,): column of the largest entry of each row, the first of equals."""
    if scores.device.type == "cpu":  # NumPy's is vectorised: 2 ms against 41 ms of torch's for 8192 x 2000
        return torch.from_numpy(scores.numpy().argmax(axis=1))
    return scores.max(dim=1).indices


def bf16_products() -> AbstractContextManager:
    """Matrix products of fp32 tensors may round their factors to bf16; sums and results stay fp32."""
    return _products("medium")


def fp32_products() -> AbstractContextManager:
    """Matrix products of fp32 tensors are those of fp32, whatever the process allows otherwise."""
    return _products("highest")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """The precision is the process's own, so threads take turns: else one gives back what another has set."""
    with _TURN:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@lru_cache
def bf16_products_are_rounded(device: str) -> bool:
    """Whether `bf16_products` changes anything here, as it does where the hardware has a faster path for them."""
    factor = torch.full((256, 256), 1.0 + 2.0**-12, device=device)
    with fp32_products():
        exact = factor @ factor
    with bf16_products():
        return not torch.equal(factor @ factor, exact)
