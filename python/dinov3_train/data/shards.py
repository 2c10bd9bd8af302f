"""WebDataset tar shards with random access: an index of member offsets, made once when the source is opened."""

from __future__ import annotations

import os
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from .sources import IMAGE_SUFFIXES, PackedStrings, Source

OPEN_SHARDS = 64  # handles kept per process
BLOCK = 512  # bytes of a tar header


@dataclass(frozen=True)
class _Member:
    sample: int  # number of the sample in its shard
    suffix: str  # lower case, after the first dot of the file name
    offset: int  # bytes
    size: int


class ShardSource(Source):
    """Samples of tar shards: members of one stem (the path up to the first dot of the file name) belong together.

    Of each sample one member is the image (a suffix such as jpg, any case); the others are extras: `cls` holds the
    label as decimal text, `mask.png` or `json` are read by `read_extra`. A sample without an image is left out, with
    a warning. Errors: a shard that is missing, truncated, damaged or without images.
    """

    def __init__(self, shards: Sequence[str]) -> None:
        self._shards = list(shards)
        self._handles = _Handles()
        names, images, extras = [], [], []
        self._suffixes: dict[str, int] = {}
        for number, shard in enumerate(self._shards):
            stems, members = _index(shard)
            chosen = _images(shard, stems, members)
            place = {sample: len(names) + rank for rank, sample in enumerate(chosen)}
            for sample, member in chosen.items():
                names.append(f"{stems[sample]}.{member.suffix}")
                images.append((number, member.offset, member.size))
            for member in members:
                if member.sample in chosen and member is not chosen[member.sample]:
                    suffix = self._suffixes.setdefault(member.suffix, len(self._suffixes))
                    extras.append((place[member.sample], suffix, member.offset, member.size))
        self._names = PackedStrings(names)
        self._images = np.array(images, dtype=np.int64)  # (n, 3) shard, offset, size
        extras = np.array(sorted(extras), dtype=np.int64).reshape(-1, 4)
        self._extras = extras  # (m, 4) image, suffix, offset, size

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self._shards[self._images[index, 0]]}:{self._names[index]}"

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(entry) for entry in self._images[index])
        return self._handles.read(self._shards[shard], offset, size)

    def read_extra(self, index: int, suffix: str) -> bytes | None:
        start, stop = np.searchsorted(self._extras[:, 0], [index, index + 1])
        wanted = self._suffixes.get(suffix.lower().lstrip("."))
        for _, found, offset, size in self._extras[start:stop].tolist():
            if found == wanted:
                return self._handles.read(self._shards[int(self._images[index, 0])], offset, size)
        return None

    def label(self, index: int) -> int | None:
        text = self.read_extra(index, "cls")
        if text is None:
            return None
        try:
            return int(text)
        except ValueError as error:
            raise ValueError(
                f"data: {self.name(index)}: expected .cls to hold a class number, got {text[:40]!r}"
            ) from error


def _index(shard: str) -> tuple[list[str], list[_Member]]:
    """Stems and members of a shard, in the order of the file."""
    stems: dict[str, int] = {}
    members = []
    with _open(shard) as stream:
        length = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        for entry in _entries(shard, stream, length):
            folder, _, file = entry.name.rpartition("/")
            stem, _, suffix = file.partition(".")
            if entry.isreg() and stem:  # a file without a stem is hidden, such as macOS's "._" copies
                sample = stems.setdefault(f"{folder}/{stem}" if folder else stem, len(stems))
                members.append(_Member(sample, suffix.lower(), entry.offset_data, entry.size))
    return list(stems), members


def _entries(shard: str, stream: BinaryIO, length: int) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar; a cut or damaged file is an error with the byte where reading ended."""
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")
    except tarfile.TarError as error:
        raise ValueError(f"data: shard {shard} is no uncompressed tar ({error}; {length} bytes)") from error
    while True:
        place = archive.offset
        try:
            entry = archive.next()
        except tarfile.TarError as error:
            raise ValueError(
                f"data: shard {shard} is truncated or damaged after byte {place} of {length} ({error})"
            ) from error
        if entry is None:
            break
        if entry.offset_data + entry.size > length:
            needed = entry.offset_data + entry.size
            raise ValueError(f"data: shard {shard} is truncated at byte {length}: {entry.name} ends at byte {needed}")
        yield entry
        archive.members.clear()  # tarfile keeps all of them otherwise
    stream.seek(place)
    block = stream.read(BLOCK)
    if not block:
        warnings.warn(f"data: shard {shard} has no end mark after byte {place}: it may be truncated", stacklevel=5)
    if block.strip(b"\0"):  # tarfile takes a damaged header for the end
        raise ValueError(f"data: shard {shard} is damaged at byte {place} of {length}: expected a tar header")


def _images(shard: str, stems: list[str], members: list[_Member]) -> dict[int, _Member]:
    """The image of each sample that has one, by sample number."""
    chosen: dict[int, _Member] = {}
    for member in members:
        if member.suffix in IMAGE_SUFFIXES:
            chosen.setdefault(member.sample, member)
    if not chosen:
        seen = ", ".join(sorted({member.suffix for member in members})[:10]) or "none"
        raise ValueError(f"data: no image in shard {shard}: its suffixes, from the first dot of a name, are {seen}")
    bare = [stem for sample, stem in enumerate(stems) if sample not in chosen]
    if bare:
        warnings.warn(
            f"data: shard {shard}: {len(bare)} samples without an image, such as {bare[0]}, are left out", stacklevel=5
        )
    return dict(sorted(chosen.items()))


def _open(shard: str) -> BinaryIO:
    """The shard as a seekable stream; URLs through fsspec."""
    try:
        if "://" not in shard:
            return open(shard, "rb")
        import fsspec  # only remote shards need it

        return fsspec.open(shard, "rb").open()
    except ImportError as error:
        raise ValueError(f"data: {shard} needs a package that is not installed ({error})") from error
    except OSError as error:
        raise ValueError(f"data: cannot open shard {shard} ({error})") from error


class _Handles:
    """Open shards of this process, the most recently used ones; a forked or spawned process opens its own."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"_process": None, "_open": OrderedDict()}

    def read(self, shard: str, offset: int, size: int) -> bytes:
        if self._process != os.getpid():  # a shared file position would mix the reads of two processes
            self._process, self._open = os.getpid(), OrderedDict()
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = _open(shard)
        self._open.move_to_end(shard)
        stream = self._open[shard]
        stream.seek(offset)
        data = stream.read(size)
        if len(data) != size:
            raise OSError(f"shard {shard} ended: expected {size} bytes at byte {offset}, got {len(data)}")
        return data
