"""Folders of embeddings made by hand, and two ranks of one process."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov3_ext import Collectives
from dinov3_train.curation.embeddings import Embeddings, write_shard
from dinov3_train.curation.files import write_json


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, fp16."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def blobs(
    counts: Sequence[int], *, dim: int = 16, spread: float = 0.05, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows fp16 (sum of counts, dim) around one random direction for each count, shuffled, and their blobs."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((len(counts), dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    labels = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    return unit(centres[labels] + spread * generator.standard_normal((len(labels), dim))), labels


def write_pool(
    path: Path, rows: np.ndarray, *, shard_rows: int = 100, hashes: Sequence[str] | None = None, sides=None
) -> Embeddings:
    """A folder as `embed` leaves it."""
    numbers = range(0, len(rows), shard_rows)
    write_json(path / "settings.json", {"shards": len(numbers)})
    for shard, start in enumerate(numbers):
        places = range(start, min(start + shard_rows, len(rows)))
        index = {
            "source": ["/pool"] * len(places),
            "index": list(places),
            "name": [f"/pool/{n}.jpg" for n in places],
            "width": [40 if sides is None else int(sides[n]) for n in places],
            "height": [30] * len(places),
            "hash": [f"{n:x}" if hashes is None else hashes[n] for n in places],
        }
        write_shard(path, shard, np.ascontiguousarray(rows[start : places.stop]), index, [])
    return Embeddings(path)


class Threads:
    """The exchanges of several ranks that are threads of this process."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=60)
        self._given: list[torch.Tensor | None] = [None] * count
        self.count = count

    def collectives(self, rank: int) -> Collectives:
        """What a rank is handed."""

        def exchange(tensor: torch.Tensor, join: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
            self._given[rank] = tensor
            self._barrier.wait()
            found = join([each.clone() for each in self._given])
            self._barrier.wait()
            return found

        joins = {"sum": lambda parts: torch.stack(parts).sum(0), "max": lambda parts: torch.stack(parts).amax(0)}
        return Collectives(
            lambda tensor, op: exchange(tensor, joins[op]), lambda tensor: exchange(tensor, torch.cat), rank, self.count
        )

    def run(self, work: Callable[[Collectives], object]) -> list:
        """`work(collectives)` on every rank at once; the results in order."""
        found: list = [None] * self.count
        errors: list[BaseException] = []

        def on(rank: int) -> None:
            try:
                found[rank] = work(self.collectives(rank))
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return found


@pytest.fixture(name="blobs")
def blobs_fixture():
    return blobs


@pytest.fixture(name="write_pool")
def write_pool_fixture():
    return write_pool


@pytest.fixture(name="unit")
def unit_fixture():
    return unit


@pytest.fixture(name="small_blocks")
def small_blocks_fixture(monkeypatch):
    """Blocks of 64 rows, so that small pools have several."""
    monkeypatch.setattr("dinov3_train.curation.kmeans.ROWS", {"cpu": 64, "cuda": 64})


@pytest.fixture(name="on_ranks")
def on_ranks_fixture(monkeypatch):
    """on_ranks(count, work): `work(collectives)` on so many ranks, as threads."""
    lock, literal_eval = threading.Lock(), ast.literal_eval

    def one_by_one(text):
        with lock:
            return literal_eval(text)

    # numpy reads a file's header with it, and CPython 3.11 counts its depth for all threads in one place (gh-106905)
    monkeypatch.setattr(ast, "literal_eval", one_by_one)
    return lambda count, work: Threads(count).run(work)
