"""The images that a manifest names, as a source of their own."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
from PIL import Image

from .manifest import absolute_spec, read_column, read_manifest, valid_text
from .sources import ConcatenatedSource, PackedStrings, Source, nearest_name, open_source

COLUMNS = ("source", "index", "name")


def open_manifest(spec: str) -> ManifestSource:
    """`FILE.parquet`, or `FILE.parquet:part=NAME` for the rows of one part."""
    name, _, part = spec.partition(":part=")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist{nearest_name(path)}")
    return ManifestSource(path, part or None)


class ManifestSource(Source):
    """The rows of a manifest, or of one part of it, in their order; labels and extras come from the sources it names.

    Those sources are opened when an image is first read, or by `ready`; every row is then compared with them.
    Errors: a manifest that cannot be read or has no rows, a source that is missing or has changed since.
    """

    def __init__(self, path: Path, part: str | None = None) -> None:
        self._path, self._part = path, part
        self._columns: dict[str, pa.ChunkedArray | None] = {}  # those that `field` was asked for
        table = _rows(path, part)
        encoded = table["source"].combine_chunks().dictionary_encode()
        self._specs: list[str] = encoded.dictionary.to_pylist()
        self._which = encoded.indices.to_numpy().astype(np.int32)  # (n,) number of the source
        self._index = table["index"].to_numpy()  # (n,) number in that source
        self._names = PackedStrings(itertools.chain.from_iterable(chunk.to_pylist() for chunk in table["name"].chunks))
        self._joined: ConcatenatedSource | None = None
        self._firsts = np.zeros(0, dtype=np.int64)  # first number of each source in the joined one

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes | Image.Image:
        return self.ready()._joined.read(self._find(index))

    def read_extra(self, index: int, suffix: str) -> bytes | None:
        return self.ready()._joined.read_extra(self._find(index), suffix)

    def field(self, index: int, name: str) -> str | int | float | None:
        """The manifest's column of that name, else what the image's own source says."""
        if name not in self._columns:
            self._columns[name] = _column(self._path, self._part, name)
        column = self._columns[name]
        if column is None:
            return self.ready()._joined.field(self._find(index), name)
        return _value(column[index].as_py(), name, self._path)

    def label(self, index: int) -> int | None:
        return self.ready()._joined.label(self._find(index))

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, by label."""
        return self.ready()._joined.classes

    def ready(self) -> ManifestSource:
        """Open the sources that the manifest names, compare every row with them."""
        if self._joined is None:
            sources = [self._open(spec) for spec in self._specs]
            for number, source in enumerate(sources):
                self._compare(number, source)
            self._firsts = np.cumsum([0, *map(len, sources[:-1])], dtype=np.int64)
            self._joined = ConcatenatedSource(sources)
        return self

    def _find(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image number {index} is outside 0 to {len(self) - 1}")
        return int(self._firsts[self._which[index]] + self._index[index])

    def _open(self, spec: str) -> Source:
        if absolute_spec(spec) == absolute_spec(str(self._path)):
            raise ValueError(f"data: the manifest {self._path} names itself as a source")
        try:
            return open_source(spec).ready()
        except ValueError as error:
            reason = str(error).removeprefix("data: ")
            raise ValueError(
                f"data: a source that the manifest {self._path} names cannot be opened: {reason}"
            ) from error

    def _compare(self, number: int, source: Source) -> None:
        for row in np.flatnonzero(self._which == number).tolist():
            index, wanted = int(self._index[row]), self._names[row]
            found = valid_text(source.name(index)) if 0 <= index < len(source) else None
            if found != wanted:
                now = f"has {len(source)} images" if found is None else f"has {found} there"
                raise ValueError(
                    f"data: {self._specs[number]} has changed since the manifest {self._path} was written: "
                    f"image {index} was {wanted}, it now {now}; restore it, or curate again"
                )


def _column(path: Path, part: str | None, name: str) -> pa.ChunkedArray | None:
    """A column of the rows of one part, None where the manifest has none of that name."""
    column = read_column(path, name)
    if column is None or part is None:
        return column
    return column.filter(compute.equal(read_column(path, "part"), part))


def _value(value: object, name: str, path: Path) -> str | int | float | None:
    """A list such as a cluster path is written with slashes; an empty one is nothing."""
    if isinstance(value, list):
        return "/".join(map(str, value)) or None
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"data: {path}: expected text or a number as {name}, got {type(value).__name__}")
    return value


def _rows(path: Path, part: str | None) -> pa.Table:
    """The columns that a source needs, of one part if one is asked for."""
    table = read_manifest(path, COLUMNS if part is None else (*COLUMNS, "part"))
    if part is not None:
        parts = sorted(entry for entry in compute.unique(table["part"]).to_pylist() if entry is not None)
        if part not in parts:
            raise ValueError(f"data: the manifest {path} has no part {part!r}; its parts: {', '.join(parts) or 'none'}")
        table = table.filter(compute.equal(table["part"], part))
    if not table.num_rows:
        raise ValueError(f"data: the manifest {path} has no rows, expected one for each image")
    for name in COLUMNS:
        if table[name].null_count:
            raise ValueError(f"data: the manifest {path} has {table[name].null_count} rows without {name}")
    return table
