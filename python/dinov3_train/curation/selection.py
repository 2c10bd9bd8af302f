"""From chosen rows of embeddings to the rows of a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.manifest import write_manifest
from .embeddings import INDEX, Embeddings

BLOCK = 65536  # rows of a manifest made at a time


@dataclass(frozen=True)
class Selection:
    """Rows of a set of embeddings, and what is known of each.

    rows: int64 (n,). parts: n texts, or one for all. cluster_paths: int32 (n, levels), top first, or None.
    retrieval_seeds: names of the seed images, "" for none, or None. duplicate_groups: int64 (n,), -1 for none, or None.
    """

    embeddings: Embeddings
    rows: np.ndarray
    parts: Sequence[str] | str
    cluster_paths: np.ndarray | None = None
    retrieval_seeds: Sequence[str] | None = None
    duplicate_groups: np.ndarray | None = None

    def blocks(self) -> Iterator[dict[str, Sequence]]:
        """Columns of the manifest's schema, a part of the rows at a time."""
        index = self.embeddings.table()
        for start in range(0, len(self.rows), BLOCK):
            rows = self.rows[start : start + BLOCK]
            place = slice(start, start + len(rows))
            known = index.take(rows)
            yield {
                **{name: known[name].to_pylist() for name in INDEX.names},
                "cluster_path": [[] for _ in rows]
                if self.cluster_paths is None
                else self.cluster_paths[place].tolist(),
                "retrieval_seed": [""] * len(rows) if self.retrieval_seeds is None else self.retrieval_seeds[place],
                "duplicate_group": [-1] * len(rows) if self.duplicate_groups is None else self.duplicate_groups[place],
                "part": [self.parts] * len(rows) if isinstance(self.parts, str) else self.parts[place],
            }


def write_selections(path: Path, selections: Iterable[Selection], settings: dict) -> Path:
    """The manifest of all selections. Errors: OSError, one line, when it cannot be written."""
    try:
        return write_manifest(path, (block for one in selections for block in one.blocks()), settings)
    except OSError as error:
        raise OSError(f"curate: cannot write {path} ({error.strerror or error})") from error
