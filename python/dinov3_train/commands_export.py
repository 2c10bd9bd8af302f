"""`dinov3 export`: weights of anything `backbone=` takes, written for another library and checked there."""

from __future__ import annotations

from pathlib import Path

from .weights import resolve
from .weights.export import FORMATS, export

SUFFIXES = {".safetensors": "safetensors", ".onnx": "onnx", ".pth": "meta"}


def export_weights(*, backbone: str, step: int | None, to: str | None, out: Path, heads: bool) -> None:
    """Resolve, write, read back, compare; print what was found and under which licence it stands."""
    to = to or SUFFIXES.get(out.suffix.lower())
    if to is None:
        raise ValueError(f"export: expected to=hf, timm, meta, safetensors or onnx for out={out}, got nothing")
    found = resolve(backbone, step=step)
    print(f"from {found.origin}: {found.architecture.name}, licence: {found.licence}")
    done = export(found, to, out, heads=heads)
    sizes = " and ".join(f"{height} x {width}" for height, width in done.sizes)
    print(
        f"wrote {done.path}, {FORMATS[to].words}; read back there, features at {sizes} px differ by at most "
        f"{done.difference:.1e} (their standard deviation is {done.deviation:.2f})"
    )
    if done.lost:
        print(f"not in it: {', '.join(done.lost)}")
