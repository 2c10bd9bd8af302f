"""Sources of images: folder, file list, WebDataset tar shards, torchvision dataset, manifest, or several together.

Every source answers the same questions by image number, holds its index in flat arrays (workers share it) and can be
pickled. Nothing is decoded here.
"""

from __future__ import annotations

import bisect
import difflib
import glob
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .sampler import Sampler

# lower case; compared without regard to case
IMAGE_SUFFIXES = frozenset({"avif", "bmp", "dib", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg"})
IMAGE_SUFFIXES |= {"pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"}
# what lies beside an image and belongs to it, as `NAME.mask.png` beside `NAME.jpg`; never an image of its own
COMPANIONS = ("mask.png", "depth.png")


class Source(ABC):
    """Images by number, 0 to len - 1, with names, and labels where there are some."""

    classes: list[str] | None = None  # names of the classes, by label

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Path of the image, or shard:member."""

    @abstractmethod
    def read(self, index: int) -> bytes | Image.Image:
        """The image's file as bytes, or the image itself where the source has no file."""

    def ready(self) -> Source:
        """Do what the first read would do, such as opening files, so that errors come early; returns the source."""
        return self

    def sampler(self, seed: int, batch_size: int) -> Sampler:
        """The order in which a run draws the images: here every image equally often."""
        return Sampler(len(self), seed)

    def label(self, index: int) -> int | None:
        """Class of the image, None where it has none."""
        return None

    def read_extra(self, index: int, suffix: str) -> bytes | None:
        """The sample's other file of this suffix (such as "mask.png" or "json"), None where it has none."""
        return None

    def field(self, index: int, name: str) -> str | int | float | None:
        """What is written about the image under `name`: an entry of its .json, None where there is none.

        Errors: ValueError for a .json that holds no object, or an entry that is no text, number or truth value.
        """
        text = self.read_extra(index, "json")
        if text is None:
            return None
        try:
            about = json.loads(text)
        except ValueError as error:
            raise ValueError(f"data: {self.name(index)}: its .json cannot be read ({error})") from error
        if not isinstance(about, dict):
            raise ValueError(f"data: {self.name(index)}: expected an object in its .json, got {type(about).__name__}")
        value = about.get(name)
        if value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(f"data: {self.name(index)}: expected text or a number as {name}, got {value!r:.60}")
        return value


def open_source(spec: str | os.PathLike | Sequence[str | os.PathLike]) -> Source:
    """The source that `spec` describes; several specs are one source, in the order given.

    A folder: every image below it; the first folder level names the class. A .txt file: one path a line, relative to
    the list, optionally a TAB and a label; or one shard a line. Tar shards: a .tar, `x-{000..012}.tar`, a glob, several
    with commas, URLs (file://, http(s)://, s3://, ... through fsspec). `torchvision:NAME[:root=PATH][:split=train]
    [:download=true]`. A manifest of `dinov3 curate`: `FILE.parquet`, or `FILE.parquet:part=NAME`. Commas between specs
    of any kind. Errors: ValueError for what is missing, empty or damaged.
    """
    if isinstance(spec, (str, os.PathLike)):
        return _open_one(os.fspath(spec))
    sources = [open_source(entry) for entry in spec]
    if not sources:
        raise ValueError(
            "data: expected at least one source (folder, list, shards, torchvision:NAME or manifest), got none"
        )
    return sources[0] if len(sources) == 1 else ConcatenatedSource(sources)


def _open_one(spec: str) -> Source:
    from .shards import ShardSource  # it needs `Source`
    from .torchvision_source import open_torchvision

    path, parts = Path(spec).expanduser(), split_commas(spec)
    if len(parts) > 1 and not path.exists() and not all(_is_shard(part) for part in parts):
        return open_source(parts)
    if spec.startswith("torchvision:"):
        return open_torchvision(spec)
    if re.search(r"\.parquet(:part=.+)?$", spec, re.IGNORECASE):
        from .manifest_source import open_manifest  # slow to import, and no other source needs it

        return open_manifest(spec)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and path.suffix.lower() == ".txt":
        lines = read_list(path)
        if all(_is_shard(line.split("\t")[0]) for line in lines):
            return ShardSource([_beside(path, line.strip()) for line in lines])
        return ListSource(path, lines)
    if path.is_file() and not _is_shard(spec):
        raise ValueError(
            f"data: {spec} is a file of another kind, expected a folder, .txt list, .tar shard or .parquet manifest"
        )
    shards = [shard for pattern in split_commas(spec) for text in expand_braces(pattern) for shard in _matches(text)]
    return ShardSource(shards)


def _is_shard(text: str) -> bool:
    """Whether the path or URL (a query after "?" aside) ends in .tar."""
    return (text.split("?")[0] if "://" in text else text).strip().lower().endswith(".tar")


def _beside(path: Path, entry: str) -> str:
    """`entry` of the list at `path`: URLs and absolute paths as they are, others relative to the list's folder."""
    return entry if "://" in entry else str(path.parent / entry)


def _matches(pattern: str) -> list[str]:
    """The shards that a path, URL or glob stands for, sorted; none is an error."""
    if "://" in pattern:
        if not _is_shard(pattern):
            raise ValueError(f"data: expected a URL that ends in .tar, got {pattern}")
        return [pattern] if not set(pattern.split("?")[0]) & set("*[") else _remote_matches(pattern)
    path = os.path.expanduser(pattern)
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    wrong = [name for name in found if not _is_shard(name)]
    if found and not wrong:
        return found
    if wrong:
        raise ValueError(f"data: {pattern} matches {wrong[0]}, expected .tar shards only")
    raise ValueError(f"data: {pattern} does not exist{nearest_name(Path(path))}")


def _remote_matches(pattern: str) -> list[str]:
    import fsspec

    try:
        found = sorted(opened.full_name for opened in fsspec.open_files(pattern))
    except (ImportError, OSError) as error:
        raise ValueError(f"data: cannot list {pattern} ({error})") from error
    if not found:
        raise ValueError(f"data: {pattern} matches no shard")
    return found


def nearest_name(path: Path) -> str:
    """A hint after "does not exist": entries of the nearest existing parent that look alike."""
    parent = next((above for above in path.parents if above.is_dir()), Path("."))
    missing = path.relative_to(parent).parts[0] if path.is_relative_to(parent) else path.name
    close = difflib.get_close_matches(missing, sorted(os.listdir(parent)), n=3, cutoff=0.5)
    return f"; {parent} holds {', '.join(close)}" if close else f"; {parent} holds nothing of a similar name"


def split_commas(text: str) -> list[str]:
    """The parts between commas that stand outside braces."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def expand_braces(text: str) -> list[str]:
    """`a{00..02}b` to a00b, a01b, a02b (width kept), `{x,y}` to x and y; several braces multiply."""
    start, end = text.find("{"), text.find("}")
    if start < 0 or end < start:
        return [text]
    inner = text[start + 1 : end]
    first, dots, last = inner.partition("..")
    if dots and first.isdigit() and last.isdigit():
        options = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        options = inner.split(",")
    if not options:
        raise ValueError(
            f"data: {{{inner}}} is an empty range, expected {{first..last}} with first <= last, got {text}"
        )
    return [text[:start] + option + rest for option in options for rest in expand_braces(text[end + 1 :])]


class PackedStrings(Sequence):
    """Strings in one byte buffer with int64 ends: ten million names cost their letters; forked workers share them."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in strings]
        self._buffer = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image number {index} is outside 0 to {len(self) - 1}")
        return os.fsdecode(self._buffer[self._ends[index] : self._ends[index + 1]])


class FileSource(Source):
    """Image files by path, each with an optional label."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int | None], classes: list[str] | None) -> None:
        self._paths = PackedStrings(paths)
        self._labels = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        return Path(self._paths[index]).read_bytes()

    def label(self, index: int) -> int | None:
        label = int(self._labels[index])
        return None if label < 0 else label

    def read_extra(self, index: int, suffix: str) -> bytes | None:
        path = Path(self._paths[index])
        for stem in dict.fromkeys((path.stem, path.name.split(".")[0])):  # "a.b.jpg": a.b.mask.png, else a.mask.png
            beside = path.with_name(f"{stem}.{suffix.lstrip('.')}")
            if beside.is_file():
                return beside.read_bytes()
        return None


class FolderSource(FileSource):
    """All images below a folder, sorted by path; the name of the first folder level is the class.

    Links are followed and each folder is entered once, so a link to a parent ends. Hidden files and folders (a leading
    dot, as in macOS's "._" copies) are left out, and so are companions of images: `NAME.mask.png`, `NAME.depth.png`.
    """

    def __init__(self, root: Path) -> None:
        found, other = [], {}
        try:
            for path in _walk(root):
                suffix = os.path.splitext(path)[1][1:].lower()
                if suffix in IMAGE_SUFFIXES and not _is_companion(path):
                    found.append(path)
                else:
                    other[suffix] = other.get(suffix, 0) + 1
        except OSError as error:
            raise ValueError(f"data: cannot list folder {error.filename} ({error.strerror})") from error
        if not found:
            seen = ", ".join(f".{suffix} ({count})" for suffix, count in sorted(other.items())) or "no files at all"
            expected = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"data: no image below {root}: it holds {seen}; expected {expected}")
        found.sort()
        first = [os.path.relpath(path, root).split(os.sep) for path in found]
        names = [parts[0] if len(parts) > 1 else None for parts in first]
        classes = sorted({name for name in names if name is not None})
        number = {name: label for label, name in enumerate(classes)}
        super().__init__(found, [number.get(name) for name in names], classes or None)


def _is_companion(path: str) -> bool:
    """Whether the file describes an image beside it, as `NAME.mask.png` does."""
    return path.lower().endswith(tuple(f".{suffix}" for suffix in COMPANIONS))


def _walk(root: Path) -> Iterator[str]:
    """Paths of all files below `root` that are not hidden; real folders are entered before linked ones, each once."""
    entered, folders, links = set(), [str(root)], []
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # a link to itself is a file
                    (links if entry.is_symlink() else folders).append(entry.path)
                else:
                    yield entry.path


def read_list(path: Path) -> list[str]:
    """The lines of a list that are not blank; none is an error."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"data: the list {path} is empty, expected one path a line")
    return lines


class ListSource(FileSource):
    """The files that a list names: `path`, or `path TAB label`; labels that are all numbers are taken as they are."""

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        fields = [line.split("\t") for line in lines]
        wrong = next((line for line, parts in zip(lines, fields) if len(parts) > 2), None)
        if wrong is not None:
            raise ValueError(f"data: {path}: expected `path` or `path TAB label` on each line, got {wrong!r}")
        paths = [_beside(path, parts[0].strip()) for parts in fields]
        if not any(os.path.exists(entry) for entry in paths[:100]):
            raise ValueError(f"data: {path}: none of its first {len(paths[:100])} paths exists, such as {paths[0]}")
        labels = [parts[1].strip() if len(parts) == 2 and parts[1].strip() else None for parts in fields]
        names = {label for label in labels if label is not None}
        if all(label.isdigit() for label in names):
            super().__init__(paths, [None if label is None else int(label) for label in labels], None)
        else:
            number = {name: label for label, name in enumerate(sorted(names))}
            super().__init__(paths, [number.get(label) for label in labels], sorted(names))


class ConcatenatedSource(Source):
    """Several sources one after another. Named classes are united by name; numbered ones keep their numbers."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(len(source) for source in sources))
        named = [source.classes for source in sources if source.classes is not None]
        self.classes = sorted(set(itertools.chain.from_iterable(named))) if named else None
        self._numbers = {name: label for label, name in enumerate(self.classes or [])}

    def __len__(self) -> int:
        return self._ends[-1]

    def ready(self) -> ConcatenatedSource:
        for source in self._sources:
            source.ready()
        return self

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image number {index} is outside 0 to {len(self) - 1}")
        place = bisect.bisect_right(self._ends, index)
        return self._sources[place], index - (self._ends[place - 1] if place else 0)

    def name(self, index: int) -> str:
        source, inner = self._find(index)
        return source.name(inner)

    def read(self, index: int) -> bytes | Image.Image:
        source, inner = self._find(index)
        return source.read(inner)

    def read_extra(self, index: int, suffix: str) -> bytes | None:
        source, inner = self._find(index)
        return source.read_extra(inner, suffix)

    def field(self, index: int, name: str) -> str | int | float | None:
        source, inner = self._find(index)
        return source.field(inner, name)

    def label(self, index: int) -> int | None:
        source, inner = self._find(index)
        label = source.label(inner)
        if label is None or self.classes is None:
            return label
        if source.classes is None:
            raise ValueError(
                f"data: {source.name(inner)} has label {label} without a name, other sources have class names"
            )
        return self._numbers[source.classes[label]]
