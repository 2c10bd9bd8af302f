"""A pool made unbalanced and full of duplicates on purpose, from the real photographs, and what curation made of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

from dinov3_train.data.manifest import read_manifest
from dinov3_train.data.sources import open_source

SETS = ("caltech101", "clothing", "facade")
REPEATED = ("accordion", "bonsai", "buddha", "ceiling_fan")  # classes of caltech101 that are there 20 times
COPIES = 19
KINDS = ("equal", "encoded", "cropped")


def build(shared: Path, out: Path, *, stride: int) -> int:
    """Folders `out`/<set>_<class> with every `stride`-th labelled image, named <set>-<number>.jpg, its duplicates
    <set>-<number>.<copy><kind>.jpg: 19 of each image of four classes, and one each of a tenth of the others. Returns
    the number of files."""
    rng = np.random.default_rng(0)
    written = 0
    for name in SETS:
        source = open_source(str(shared / f"{name}-train.tar"))
        classes = (shared / f"{name}-classes.txt").read_text().splitlines()
        every = 1 if name == "facade" else stride
        for number in range(0, len(source), every):
            label = source.label(number) if name != "facade" else None
            if name != "facade" and label is None:
                continue
            kind = "street" if label is None else classes[label].replace(" ", "_")
            folder = out / f"{name}_{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            data = source.read(number)
            (folder / f"{name}-{number:05d}.jpg").write_bytes(data)
            copies = COPIES if kind in REPEATED else int(rng.random() < 0.1)
            for copy in range(copies):
                how = KINDS[(copy + number // every) % 3]
                (folder / f"{name}-{number:05d}.{copy:02d}{how}.jpg").write_bytes(duplicate(data, how, rng))
            written += 1 + copies
    return written


def duplicate(data: bytes, how: str, rng: np.random.Generator) -> bytes:
    """equal: the same bytes; encoded: another JPEG quality, 40 to 95, and 0.9 to 1.1 of the size; cropped: 2 to 6 % of
    each side cut off, and encoded."""
    if how == "equal":
        return data
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = picture.size
    if how == "encoded":
        scale = rng.uniform(0.9, 1.1)
        picture = picture.resize((round(scale * width), round(scale * height)), Image.Resampling.BICUBIC)
    else:
        left, top, right, bottom = rng.uniform(0.01, 0.03, 4)
        picture = picture.crop(
            (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
        )
    stored = io.BytesIO()
    picture.save(stored, "JPEG", quality=int(rng.integers(40, 96)))
    return stored.getvalue()


def origin(name: str) -> str:
    """The image that a file is a duplicate of, or itself."""
    return Path(name).name.split(".")[0]


def kind(name: str) -> str:
    """equal, encoded or cropped; "" for an original."""
    parts = Path(name).name.split(".")
    return parts[1][2:] if len(parts) == 3 else ""


@dataclass(frozen=True)
class Outcome:
    """entropy, in bits, of the histogram of classes of the pool, and of the curated set; recall of planted duplicates
    by kind: share that is in a group with its original or another of its duplicates; precision: share of dropped
    images that have the origin of the image kept for them."""

    entropy_before: float
    entropy_after: float
    recall: dict[str, float]
    precision: float


def judge(pool: Path, run: Path) -> Outcome:
    """Compare `dinov3 curate run` in the folder `run` with what was planted."""
    names = [str(path) for path in sorted(pool.rglob("*.jpg"))]
    chosen = read_manifest(run / "manifest.parquet", ["name", "part"]).to_pylist()
    picked = [entry["name"] for entry in chosen if entry["part"] in ("clustering", "retrieval")]
    table = parquet.read_table(run / "duplicates" / "duplicates.parquet").to_pylist()
    kept = {entry["group"]: entry["name"] for entry in table if entry["kept"]}  # by a trusted set, perhaps
    table = [entry for entry in table if entry["set"] == "pool"]
    group = {entry["name"]: entry["group"] for entry in table}
    members: dict[tuple[int, str], int] = {}
    for name, number in group.items():
        members[number, origin(name)] = members.get((number, origin(name)), 0) + 1
    recall = {}
    for how in KINDS:
        planted = [name for name in names if kind(name) == how]
        recall[how] = float(np.mean([members.get((group.get(name, -1), origin(name)), 0) > 1 for name in planted]))
    dropped = [entry for entry in table if not entry["kept"]]
    precision = float(np.mean([origin(entry["name"]) == origin(kept[entry["group"]]) for entry in dropped]))
    return Outcome(entropy(names), entropy(picked), recall, precision)


def entropy(names: list[str]) -> float:
    """Bits of the histogram of classes (folders)."""
    _, counts = np.unique([Path(name).parent.name for name in names], return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())
