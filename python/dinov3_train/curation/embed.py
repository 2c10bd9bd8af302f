"""Embed every image of some sources: unit-length features in shards on disk, a whole shard at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.decode import UnreadableImage, decode
from ..data.manifest import absolute_name, absolute_spec, content_hash
from ..data.sources import Source
from ..evaluation.extract import POOLINGS, PRECISIONS, pool
from ..evaluation.view import View
from .embeddings import index_file, shard_facts, shard_file, shard_is_whole, write_shard
from .files import claim
from .kmeans import Where


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """How images become embeddings.

    pooling: "cls", "patch_mean" or "cls+patch"; precision: "fp32" or "bf16"; shard_rows: images of a shard, what a
    kill loses at most; batch_size: images of a forward pass (a shard's batches are the same on any number of ranks);
    max_unreadable: share of images that may be unreadable, one is always allowed above 0.
    Errors: ValueError for a value outside these.
    """

    pooling: str = "cls"
    precision: str = "fp32"
    shard_rows: int = 16384
    batch_size: int = 64
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        for name, known in (("pooling", POOLINGS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"embed: {name} expects one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("shard_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"embed: {name} expects at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"embed: max_unreadable is a share from 0 to 1, got {self.max_unreadable}")


@dataclass(frozen=True)
class Pool:
    """Images of several sources, numbered one source after another; `specs` as in `data=`."""

    specs: tuple[str, ...]  # with absolute paths
    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def find(self, number: int) -> tuple[int, int]:
        """(source, index in it) of image `number`."""
        for place, source in enumerate(self.sources):
            if number < len(source):
                return place, number
            number -= len(source)
        raise IndexError("image number outside the pool")


def embed(
    backbone: nn.Module,
    images: Pool,
    view: View,
    out: Path,
    *,
    settings: EmbedSettings,
    where: Where,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Write the embeddings of all readable images to the folder `out`; finished shards of an earlier call are kept.

    Args:
        backbone: has `.features(images)`, on the device to use.
        images: of all ranks; rank r of W makes the shards r, r + W, ...
        view: size and normalisation.
        out: new, empty, or of this very call: the same images, backbone and settings.
        where: ranks, and who is told how many images of this rank are done.

    Returns the unreadable images of all ranks, `name: reason`. Rows are unit-length, fp16.
    Errors: ValueError for a folder of other settings, features that are not finite, too many unreadable images;
        OSError for a full disk: finished shards stay.
    """
    shards = -(-len(images) // settings.shard_rows)
    about = {
        "specs": list(images.specs),
        "images": len(images),
        "shards": shards,
        "weights": weights_digest(backbone),
        "view": view.to_dict(),
        **asdict(settings),
    }
    if where.first:
        claim(out, about, "embed")
    where.meet()
    mine = range(where.collectives.rank, shards, where.collectives.world_size)
    total = sum(len(_span(images, settings, number)) for number in mine)
    unreadable, done = [], 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
        for number in mine:
            span = _span(images, settings, number)
            if _finished(out, number, images):
                done += len(span)
                where.progress(done, total)
            else:
                if shard_file(out, number).exists():
                    say(f"{shard_file(out, number).name} is unfinished or damaged: made again")
                _make_shard(
                    backbone, images, view, out, number=number, settings=settings, threads=threads,
                    advance=lambda count, before=done: where.progress(before + count, total),
                )  # fmt: skip
                done += len(span)
            unreadable += shard_facts(index_file(out, number))["unreadable"]
            _allow(unreadable, len(images), settings)
    where.meet()
    unreadable = [entry for number in range(shards) for entry in shard_facts(index_file(out, number))["unreadable"]]
    _allow(unreadable, len(images), settings)
    return unreadable


def _allow(unreadable: Sequence[str], count: int, settings: EmbedSettings) -> None:
    if len(unreadable) > (max(1.0, settings.max_unreadable * count) if settings.max_unreadable > 0 else 0.0):
        listed = "; ".join(unreadable[:10]) + ("; ..." if len(unreadable) > 10 else "")
        raise ValueError(
            f"embed: {len(unreadable)} of {count} images are unreadable, more than the allowed share "
            f"max_unreadable = {settings.max_unreadable:g}: {listed}"
        )


def weights_digest(backbone: nn.Module) -> str:
    """Hexadecimal text that changes with any weight: embeddings of two backbones must not share a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _span(images: Pool, settings: EmbedSettings, shard: int) -> range:
    return range(shard * settings.shard_rows, min((shard + 1) * settings.shard_rows, len(images)))


def _finished(out: Path, shard: int, images: Pool) -> bool:
    """Whether the shard is there and undamaged. Errors: ValueError when its images are not those of the source now."""
    index = index_file(out, shard)
    if not index.is_file() or not shard_is_whole(shard_file(out, shard), index):
        return False
    table = parquet.read_table(index, columns=["source", "index", "name"])
    for row in {0, table.num_rows - 1} if table.num_rows else ():
        spec, number, name = (table[column][row].as_py() for column in ("source", "index", "name"))
        source = images.sources[images.specs.index(spec)]
        now = absolute_name(source.name(number)) if number < len(source) else "nothing"
        if now != name:
            raise ValueError(
                f"embed: {spec} has changed since shard {shard} of {out} was made: image {number} was {name}, is {now}"
            )
    return True


def _make_shard(
    backbone: nn.Module,
    images: Pool,
    view: View,
    out: Path,
    *,
    number: int,
    settings: EmbedSettings,
    threads: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> None:
    span = _span(images, settings, number)
    parts: list[Tensor] = []
    index: dict[str, list] = {name: [] for name in ("source", "index", "name", "width", "height", "hash")}
    unreadable: list[str] = []
    for done, batch in _batches(images, view, span, settings.batch_size, threads):
        readable = [entry for entry in batch if not isinstance(entry, str)]
        unreadable += [entry for entry in batch if isinstance(entry, str)]
        if readable:
            parts.append(features(backbone, torch.stack([entry.pixels for entry in readable]), view, settings))
            wrong = (~torch.isfinite(parts[-1]).all(dim=1)).nonzero().flatten().tolist()
            if wrong:
                raise ValueError(f"embed: the backbone gives NaN or infinite features for {readable[wrong[0]].name}")
        for entry in readable:
            for name, values in index.items():
                values.append(getattr(entry, name))
        advance(done)
    dim = parts[0].shape[1] if parts else backbone.embed_dim * (2 if settings.pooling == "cls+patch" else 1)
    rows = torch.cat(parts) if parts else torch.empty(0, dim)
    write_shard(out, number, nn.functional.normalize(rows, dim=1).half().numpy(), index, unreadable)


# Not inference_mode: tables the backbone caches in it could not serve a later training step.
@torch.no_grad()
def features(backbone: nn.Module, pixels: Tensor, view: View, settings: EmbedSettings) -> Tensor:
    """Pooled features, fp32 (n, D), on the CPU, of pixels uint8 (n, 3, Y, X)."""
    device = next(backbone.parameters()).device
    half = settings.precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
        found = backbone.features(view.normalized(pixels.to(device)))
    return pool(found, settings.pooling).float().cpu()


@dataclass(frozen=True)
class _Image:
    source: str
    index: int
    name: str
    width: int
    height: int
    hash: str
    pixels: Tensor


def _batches(
    images: Pool, view: View, span: range, batch_size: int, threads: ThreadPoolExecutor
) -> Iterator[tuple[int, list[_Image | str]]]:
    """(images done, batch) in order; threads decode one batch ahead, bytes are read here (a source is one handle)."""
    pending: list = []
    starts = list(range(span.start, span.stop, batch_size))
    for start in [*starts, None, None]:
        if start is not None:
            numbers = range(start, min(start + batch_size, span.stop))
            pending.append((numbers.stop, [threads.submit(_image, *_read(images, n), view) for n in numbers]))
        if pending and (start is None or len(pending) > 1):
            stop, futures = pending.pop(0)
            yield stop - span.start, [future.result() for future in futures]


def _read(images: Pool, number: int) -> tuple[str, int, str, bytes | Image.Image | UnreadableImage]:
    place, index = images.find(number)
    source = images.sources[place]
    name = absolute_name(source.name(index))
    try:
        data = source.read(index)
    except UnreadableImage as error:
        data = error
    except OSError as error:  # a file that is gone or may not be read
        data = UnreadableImage(name, error.strerror or str(error))
    return images.specs[place], index, name, data


def _image(spec: str, index: int, name: str, data: bytes | Image.Image | UnreadableImage, view: View) -> _Image | str:
    try:
        if isinstance(data, UnreadableImage):
            raise data
        picture = decode(data, name)
        return _Image(spec, index, name, picture.width, picture.height, content_hash(data), view.pixels(picture))
    except UnreadableImage as error:
        return str(error)


def open_pool(specs: Sequence[str], open_source: Callable[[str], Source]) -> Pool:
    """Every spec as a source of its own, so that each image is found again by (source, index)."""
    return Pool(tuple(absolute_spec(spec) for spec in specs), tuple(open_source(spec) for spec in specs))
