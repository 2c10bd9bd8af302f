"""Embeddings on disk: fp16 shards that are memory-mapped, and beside each a Parquet index of its images."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from torch import Tensor

from .files import read_array, read_json, whole, write_array

INDEX = pa.schema(
    [
        ("source", pa.string()),
        ("index", pa.int64()),
        ("name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("hash", pa.string()),
    ]
)
SHARD = b"dinov3_shard"  # file-level key of an index: JSON with rows, dim, crc32, unreadable
CHUNK = 1 << 24  # bytes checked at a time


class Embeddings:
    """Rows of a folder of shards, numbered through all of them; nothing is in memory but what is asked for.

    path: made by `dinov3 curate embed`, or any folder of .npy files (n, D) in fp16 or fp32, taken in the order of their
    names (clustering and deduplication need no more; names, sizes and hashes are those of the index).
    Errors: ValueError for a folder that is missing, empty, unfinished, or has shards that are cut or do not agree.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"curate: expected a folder of embeddings (dinov3 curate embed), {self.path} is none")
        self.files = sorted(self.path.glob("*.npy"))
        self.settings: dict = {}
        if (self.path / "settings.json").is_file():
            self.settings = read_json(self.path / "settings.json")
            missing = [n for n in range(self.settings.get("shards", 0)) if not index_file(self.path, n).is_file()]
            if missing:
                raise ValueError(
                    f"curate: {self.path} lacks {len(missing)} of {self.settings['shards']} shards (the first is "
                    f"{shard_file(self.path, missing[0]).name}); the same curate embed command goes on"
                )
            self.files = [shard_file(self.path, n) for n in range(self.settings.get("shards", 0))] or self.files
        if not self.files:
            raise ValueError(f"curate: {self.path} holds no .npy shards")
        self._maps = [read_array(file, mapped=True) for file in self.files]
        for file, rows in zip(self.files, self._maps):
            if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
                raise ValueError(f"curate: {file}: expected fp16 or fp32 (n, D), got {rows.dtype} {rows.shape}")
            if rows.shape[1] != self._maps[0].shape[1]:
                raise ValueError(
                    f"curate: {file} has width {rows.shape[1]}, expected {self._maps[0].shape[1]} as {self.files[0]}"
                )
        self._ends = np.cumsum([len(rows) for rows in self._maps])  # (shards,)

    @property
    def dim(self) -> int:
        return self._maps[0].shape[1]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: np.ndarray) -> Tensor:
        """fp32 (n, D) of ascending row numbers int64 (n,), on the CPU. Errors: ValueError for NaN or infinite rows."""
        found = torch.empty(len(rows), self.dim)
        for shard, start, stop in self._spans(rows):
            inside = rows[start:stop] - (self._ends[shard - 1] if shard else 0)
            first, last = int(inside[0]), int(inside[-1]) + 1
            # a run of neighbours is taken as it lies: picking rows one by one costs three times as much
            picked = slice(first, last) if last - first == len(inside) else inside
            found[start:stop] = torch.from_numpy(self._maps[shard][picked])
        if not np.isfinite(float(found.sum())):  # one pass; which row it is matters only once
            wrong = (~torch.isfinite(found).all(dim=1)).nonzero().flatten().tolist()
            if wrong:
                row = int(rows[wrong[0]])
                raise ValueError(
                    f"curate: {len(wrong)} of {len(rows)} embeddings read are NaN or infinite, the first in row {row} "
                    f"of {self.path}{self._named(row)}"
                )
        return found

    def _spans(self, rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop) of the stretches of `rows` that lie in one shard."""
        start = 0
        while start < len(rows):
            shard = int(np.searchsorted(self._ends, rows[start], side="right"))
            stop = start + int(np.searchsorted(rows[start:], self._ends[shard]))
            yield shard, start, stop
            start = stop

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The index of all rows. Errors: ValueError for a folder without one (bare .npy files)."""
        tables = [_read_index(self._index(file), columns) for file in self.files]
        for file, rows, table in zip(self.files, self._maps, tables):
            if len(rows) != table.num_rows:
                raise ValueError(f"curate: {file} has {len(rows)} rows, its index {table.num_rows}; embed it again")
        return pa.concat_tables(tables)

    @property
    def indexed(self) -> bool:
        """Whether every shard has an index of its images."""
        return all(self._index(file).is_file() for file in self.files)

    @property
    def fingerprint(self) -> int:
        """A number that changes with the embeddings: of the shards' checksums, or of their shapes without an index."""
        facts = [shard_facts(self._index(file))["crc32"] for file in self.files] if self.indexed else self._shapes
        return zlib.crc32(json.dumps(facts).encode())

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [rows.shape for rows in self._maps]

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare this rank's share of the shards with their checksums. Errors: ValueError naming the damaged shard."""
        for file in self.files[rank::world_size]:
            if self._index(file).is_file() and not shard_is_whole(file, self._index(file)):
                raise ValueError(
                    f"curate: shard {file} does not agree with its checksum; the curate embed command that made "
                    "it makes damaged shards again"
                )

    def _index(self, file: Path) -> Path:
        return file.with_suffix(".parquet")

    def _named(self, row: int) -> str:
        if not self.indexed:
            return ""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        names = _read_index(self._index(self.files[shard]), ["name"])["name"]
        return f" ({names[row - int(self._ends[shard - 1] if shard else 0)]})"


def shard_file(folder: Path, number: int) -> Path:
    """The embeddings of shard `number`."""
    return folder / f"shard_{number:06d}.npy"


def index_file(folder: Path, number: int) -> Path:
    """The index of shard `number`; it is written last, so a shard with an index is complete."""
    return folder / f"shard_{number:06d}.parquet"


def write_shard(folder: Path, number: int, rows: np.ndarray, index: dict, unreadable: Sequence[str]) -> None:
    """A shard and its index. rows: fp16 (n, D); index: the columns of `INDEX`; unreadable: entries left out."""
    about = {"rows": len(rows), "dim": rows.shape[1], "crc32": zlib.crc32(rows), "unreadable": list(unreadable)}
    table = pa.table(index, schema=INDEX.with_metadata({SHARD: json.dumps(about)}))
    write_array(shard_file(folder, number), rows)
    with whole(index_file(folder, number)) as partial:
        parquet.write_table(table, partial, compression="zstd")


def shard_is_whole(file: Path, index: Path) -> bool:
    """Whether the embeddings are those that the index was written for."""
    try:
        about = shard_facts(index)
        rows = read_array(file, mapped=True)
    except ValueError:
        return False
    if (len(rows), rows.shape[-1]) != (about["rows"], about["dim"]):
        return False
    step = max(1, CHUNK // max(1, rows.itemsize * about["dim"]))
    value = 0
    for start in range(0, len(rows), step):
        value = zlib.crc32(np.ascontiguousarray(rows[start : start + step]), value)
    return value == about["crc32"]


def shard_facts(index: Path) -> dict:
    """What a shard's index says of it: rows, dim, crc32, unreadable. Errors: ValueError for a damaged index."""
    try:
        return json.loads((parquet.read_schema(index).metadata or {})[SHARD])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"curate: {index} is no index of a shard ({' '.join(str(error).split())})") from error


def _read_index(path: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        return parquet.read_table(path, columns=list(columns or INDEX.names)).replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"curate: {path}, the index of a shard, cannot be read ({' '.join(str(error).split())})"
        ) from error
