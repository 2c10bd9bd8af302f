"""Images of a source, decoded and prepared by threads ahead of the backbone."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from dinov3_train.data.decode import UnreadableImage, decode

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source

Prepared = TypeVar("Prepared")
Companion = tuple[str, bytes]  # suffix and content of a file beside the image


def prepared(
    source: Source,
    prepare: Callable[[Image.Image, Companion | None, str, int], Prepared],
    *,
    numbers: Sequence[int] | None = None,
    companions: Sequence[str] = (),
    batch_size: int = 64,
    workers: int | None = None,
) -> Iterator[tuple[list[tuple[int, Prepared]], list[str]]]:
    """Batches in order: (number in the source, what `prepare` made of the image) pairs, and why others are unreadable.

    Args:
        source: has `len`, `name(i)`, `read(i)`, and `read_extra(i, suffix)` where companions are asked for.
        prepare: (RGB image, its companion or None, its name, its number) -> anything; runs in threads, may raise
            UnreadableImage.
        numbers: images to take; None: all.
        companions: suffixes of files beside the image; the first there is is read.
        batch_size: images per batch.
        workers: threads; None: one per core, at most 8.

    Bytes are read by the caller's thread, one image after another (a source is one file handle); threads decode and
    prepare, two batches ahead.
    """
    numbers = range(len(source)) if numbers is None else numbers
    pending: deque[list[tuple[int, Future]]] = deque()
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as threads:
        try:
            for start in range(0, len(numbers), batch_size):
                part = numbers[start : start + batch_size]
                pending.append([(n, threads.submit(_made, prepare, n, *_read(source, n, companions))) for n in part])
                if len(pending) > 2:
                    yield _collected(pending.popleft())
            while pending:
                yield _collected(pending.popleft())
        finally:
            threads.shutdown(cancel_futures=True)


def companion(source: Source, number: int, suffixes: Sequence[str]) -> Companion | None:
    """The first of these files beside the image that there is, with its suffix."""
    for suffix in suffixes:
        content = source.read_extra(number, suffix)
        if content is not None:
            return suffix, content
    return None


def warn_unreadable(function: str, unreadable: Sequence[str], images: int) -> None:
    """One warning that names the first ten."""
    if unreadable:
        listed = ", ".join(unreadable[:10]) + (", ..." if len(unreadable) > 10 else "")
        message = f"{function}: {len(unreadable)} of {images} images are unreadable and left out: {listed}"
        warnings.warn(message, stacklevel=3)


def _read(
    source: Source, number: int, suffixes: Sequence[str]
) -> tuple[bytes | Image.Image | UnreadableImage, Companion | None, str]:
    name = source.name(number)
    try:
        return source.read(number), companion(source, number, suffixes), name
    except UnreadableImage as error:
        return error, None, name
    except OSError as error:  # a file that is gone or may not be read
        return UnreadableImage(name, error.strerror or str(error)), None, name


def _made(
    prepare: Callable[[Image.Image, Companion | None, str, int], Prepared],
    number: int,
    data: bytes | Image.Image | UnreadableImage,
    beside: Companion | None,
    name: str,
) -> Prepared | UnreadableImage:
    try:
        if isinstance(data, UnreadableImage):
            raise data
        return prepare(decode(data, name), beside, name, number)
    except UnreadableImage as error:
        return error


def _collected(entries: list[tuple[int, Future]]) -> tuple[list[tuple[int, Prepared]], list[str]]:
    results = [(number, future.result()) for number, future in entries]
    readable = [(number, made) for number, made in results if not isinstance(made, UnreadableImage)]
    return readable, [str(made) for _, made in results if isinstance(made, UnreadableImage)]
