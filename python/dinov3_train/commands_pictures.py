"""`dinov3 visualize attention|compare|click`: where tokens look, checkpoints side by side, a page to click on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .commands import _check_picture, _photographs, _write_picture
from .commands_health import weights_at
from .data.batch import patch_grid
from .evaluation.click_page import click_page
from .evaluation.comparison import KINDS, Column, attention_strips, column, strips
from .evaluation.maps import patch_maps
from .evaluation.pictures import sheet
from .evaluation.view import View
from .weights import Resolved, resolve


def visualize_attention(
    *, backbone: str, step: int | None, data: str, out: Path, images: int, size: int | None, block: int
) -> None:
    """Write a sheet of photographs beside the attention of CLS and of each register in one block."""
    _check_picture(out)
    found = resolve(backbone, step=step)
    seen_as = _view(found, size)
    drawn = attention_strips(_placed(found), _photographs(data, images), seen_as, block=block)
    note = f"block {block}, mean over heads, bright up to the 99th percentile; short side {seen_as.size} px"
    _write_picture(sheet(drawn, title="Attention of CLS and registers", note=note, tile=240, columns=1), out)


def visualize_compare(
    *,
    backbone: str,
    steps: tuple[int, ...],
    other: str | None,
    data: str,
    out: Path,
    images: int,
    size: int | None,
    kind: str,
    point: tuple[float, float],
) -> None:
    """Write a sheet of photographs, each beside its map from every backbone or checkpoint, before and after."""
    _check_picture(out)
    if kind not in KINDS:
        raise ValueError(f"visualize compare: kind expects one of {', '.join(KINDS)}, got {kind!r}")
    photographs = _photographs(data, images)
    columns = [
        column(name, _placed(found), photographs, _view(found, size))
        for name, found in _several(backbone, steps, other)
    ]
    titles = {
        "pca": "Patch features, first three principal components as colours",
        "cosine": "Cosine similarity of one patch to all others",
        "attention": "Attention of the CLS token in the last block",
    }
    drawn = strips(columns, kind=kind, point=point)
    _write_picture(sheet(drawn, title=titles[kind], note=_basis(columns, kind), tile=300, columns=1), out)


def visualize_click(
    *, backbone: str, steps: tuple[int, ...], other: str | None, data: str, out: Path, images: int, size: int | None
) -> None:
    """Write the page on which one clicks a patch and sees what is similar to it."""
    if out.suffix != ".html":
        raise ValueError(f"visualize click: out expects a .html file, got {str(out)!r}")
    photographs = _photographs(data, images)
    models = [
        (name, patch_maps(_placed(found), photographs, _view(found, size)))
        for name, found in _several(backbone, steps, other)
    ]
    path = click_page(models).write(out)
    print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MB")


def _several(backbone: str, steps: tuple[int, ...], other: str | None) -> list[tuple[str, Resolved]]:
    """(heading, backbone) of each step of a run, or of its newest, and of the other one."""
    found: list[tuple[str, Resolved]] = []
    for step in steps:
        found.append((f"step {step}" if step else "the start", weights_at(backbone, step)))
    if not steps:
        found.append((_short(backbone), resolve(backbone)))
    if other is not None:
        found.append((_short(other), resolve(other)))
    if len({heading for heading, _ in found}) < len(found):
        raise ValueError(f"visualize: expected different backbones, got {', '.join(heading for heading, _ in found)}")
    return found


def _short(spec: str) -> str:
    return Path(spec).name or spec


def _view(found: Resolved, size: int | None) -> View:
    seen_as = found.view(size or 2 * found.size)
    patch_grid(seen_as.size, found.backbone.patch_size, "size")
    return seen_as


def _placed(found: Resolved) -> torch.nn.Module:
    return found.backbone.to("cuda" if torch.cuda.is_available() else "cpu")


def _basis(columns: Sequence[Column], kind: str) -> str:
    if kind != "pca":
        return "each picture has its own scale"
    widths = {one.maps[0].features.shape[-1] for one in columns}
    return "one basis for all pictures" if len(widths) == 1 else "one basis for the pictures of a column"
