"""The commands that look at a trained backbone: features, pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .data.batch import patch_grid
from .data.decode import UnreadableImage, decode
from .data.sources import open_source
from .evaluation.extract import Extracted, extract, save_features
from .evaluation.pictures import cosine_sheet, pca_sheet
from .evaluation.view import View
from .weights import Resolved, resolve


def features(*, backbone: str, step: int | None, data: str, out: Path, size: int | None, pooling: str) -> None:
    """Write the features of every image."""
    model, seen_as = _backbone(backbone, step, size)
    found = _extracted(model, data, seen_as, pooling)
    print(
        f"wrote {save_features(found, out)}: {found.features.shape[0]} x {found.features.shape[1]}, "
        f"{seen_as.size} px, {pooling}"
    )


def visualize_pca(*, backbone: str, step: int | None, data: str, out: Path, images: int, size: int | None) -> None:
    """Write a sheet of photographs beside the first three principal components of their patch features."""
    _check_picture(out)
    found = resolve(backbone, step=step)
    model, seen_as = _seen(found, size or 2 * found.size)
    _write_picture(pca_sheet(model, _photographs(data, images), seen_as), out)


def visualize_cosine(
    *, backbone: str, step: int | None, data: str, out: Path, images: int, size: int | None, point: tuple[float, float]
) -> None:
    """Write a sheet of photographs beside the similarity of the patch at `point` to all others."""
    _check_picture(out)
    found = resolve(backbone, step=step)
    model, seen_as = _seen(found, size or 2 * found.size)
    photographs = _photographs(data, images)
    _write_picture(cosine_sheet(model, photographs, [[point]] * len(photographs), seen_as, columns=2), out)


def _check_picture(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise ValueError(f"out: expected a .png file, got {str(out)!r}")


def _write_picture(picture: Image.Image, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    print(f"wrote {out}: {picture.width} x {picture.height} pixels")


def _photographs(spec: str, count: int) -> list[tuple[str, Image.Image]]:
    """`count` images spread evenly over the source, with short names; unreadable ones are said and left out."""
    source = open_source(spec)
    if count < 1:
        raise ValueError(f"images: expected at least 1, got {count}")
    found = []
    for number in range(min(count, len(source))):
        index = number * len(source) // min(count, len(source))
        name = source.name(index)
        try:
            found.append((name.replace(":", "/").rsplit("/", 1)[-1], decode(source.read(index), name)))
        except (UnreadableImage, OSError) as error:
            print(f"unreadable image left out: {error}")
    if not found:
        raise ValueError(f"data: none of the {count} images looked at in {spec} can be read")
    return found


def _backbone(spec: str, step: int | None, size: int | None) -> tuple[torch.nn.Module, View]:
    return _seen(resolve(spec, step=step), size)


def _seen(found: Resolved, size: int | None) -> tuple[torch.nn.Module, View]:
    """The backbone on this machine's device, and how it sees images; ValueError for a side that does not divide."""
    seen_as = found.view(size)
    patch_grid(seen_as.size, found.side_multiple, "size")
    return found.backbone.to("cuda" if torch.cuda.is_available() else "cpu"), seen_as


def _extracted(model: torch.nn.Module, spec: str, seen_as: View, pooling: str) -> Extracted:
    source = open_source(spec)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(Path(spec).name, total=len(source))
        return extract(
            model, source, seen_as, pooling=pooling, progress=lambda done, _: progress.update(task, completed=done)
        )
