"""Weights out: written, read back through the library they are for, compared, and only then given their name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import formats
from .cards import write_beside
from .resolved import Resolved

TOLERANCE = 1e-3  # of the features' standard deviation; roundings of fp32 are 1e-6 to 1e-5 of it


@dataclass(frozen=True)
class Format:
    """A form of export: what it is in words, its file suffix ("" for a folder), how it is written and read back."""

    words: str
    suffix: str
    write: Callable[[Resolved, Path, bool], None]
    read: Callable[[Path, Resolved], formats.See]


FORMATS = {
    "hf": Format("a folder for transformers", "", formats.write_hf, formats.read_hf),
    "timm": Format("a folder for timm", "", formats.write_timm, formats.read_timm),
    "meta": Format("a file with the keys of the released weights", ".pth", formats.write_meta, formats.read_meta),
    "safetensors": Format(
        "this package's own file", ".safetensors", formats.write_safetensors, formats.read_safetensors
    ),
    "onnx": Format("an ONNX graph", ".onnx", formats.write_onnx, formats.read_onnx),
}


@dataclass(frozen=True)
class Exported:
    """What was written: the path, the largest difference of any feature at the sizes compared, and the features'
    standard deviation; lost: what this form has no place for."""

    path: Path
    difference: float
    deviation: float
    sizes: tuple[tuple[int, int], ...]
    lost: tuple[str, ...]


def export(found: Resolved, to: str, out: str | Path, *, heads: bool = False) -> Exported:
    """Write a backbone in one of `FORMATS`, read it back in its own library and compare the features of random images.

    Args:
        found: from `resolve`.
        to: "hf", "timm", "meta", "safetensors" or "onnx".
        out: file or folder; must not exist.
        heads: the projection heads too ("safetensors" only).

    Errors: ValueError for a name of another kind, a path that exists, a library that is missing, what the form cannot
        hold, or features that differ by more than 1e-3 of their standard deviation; then nothing is left behind.
    """
    out = Path(out)
    form = _checked(to, out, heads)
    holder = out.parent / f".{out.name}.partial"
    shutil.rmtree(holder, ignore_errors=True)
    holder.mkdir(parents=True)
    try:
        target = holder / out.name
        form.write(found, target, heads)
        sizes, difference, deviation = compared(found, form.read(target, found))
        if not difference <= TOLERANCE * deviation:
            raise ValueError(
                f"export: read back, the features of {out} differ by up to {difference:.2e} at a standard deviation of "
                f"{deviation:.2e}, more than rounding; nothing was written"
            )
        write_beside(found, target, to)
        for entry in sorted(holder.iterdir(), key=lambda entry: entry == target):  # the weights last
            os.replace(entry, out.parent / entry.name)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
    return Exported(out, difference, deviation, sizes, _lost(found, to, heads))


def _checked(to: str, out: Path, heads: bool) -> Format:
    if to not in FORMATS:
        raise ValueError(f"export: to expects one of {', '.join(FORMATS)}, got {to!r}")
    form = FORMATS[to]
    if form.suffix and out.suffix != form.suffix:
        raise ValueError(f"export: out expects a file that ends in {form.suffix} for {to}, got {str(out)!r}")
    if not form.suffix and out.suffix in {other.suffix for other in FORMATS.values()} - {""}:
        raise ValueError(f"export: out expects a folder for {to}, got {str(out)!r}")
    if out.exists():
        raise ValueError(f"export: {out} exists; expected a new path, nothing is overwritten")
    if heads and to != "safetensors":
        raise ValueError(f"export: heads=true goes with to=safetensors only, {to} has no place for them")
    return form


@torch.no_grad()
def compared(found: Resolved, see: formats.See) -> tuple[tuple[tuple[int, int], ...], float, float]:
    """Two sizes, the largest difference of any feature of random images of these sizes, the standard deviation of ours.

    Errors: ValueError when features have another shape.
    """
    side = found.side_multiple
    sizes = ((4 * side, 6 * side), (7 * side, 5 * side))
    generator, largest, ours_all = torch.Generator().manual_seed(0), 0.0, []
    for count, (height, width) in zip((2, 1), sizes):
        images = torch.randn(count, 3, height, width, generator=generator)
        ours, theirs = found.backbone.features(images), see(images)
        for name in ("cls", "registers", "patches"):
            expected, got = getattr(ours, name), getattr(theirs, name)
            if expected.shape != got.shape:
                raise ValueError(
                    f"export: read back, {name} are {tuple(got.shape)}, expected {tuple(expected.shape)}; "
                    "nothing was written"
                )
            if expected.numel():
                difference = float((expected - got).abs().max())
                largest = max(largest, difference) if difference == difference else float("nan")  # NaN stays
        ours_all += [ours.cls.flatten(), ours.patches.flatten()]
    return sizes, largest, float(torch.cat(ours_all).std())


def _lost(found: Resolved, to: str, heads: bool) -> tuple[str, ...]:
    lost = []
    if found.heads is not None and not heads:
        lost.append("projection heads")
    if to in ("hf", "timm", "onnx") and getattr(found.architecture, "untie_local_cls_norm", False):
        lost.append("the norm of local crops (training only)")
    if to in ("timm", "onnx") and hasattr(found.backbone, "mask_token"):
        lost.append("the mask token (training only)")
    return tuple(lost)
