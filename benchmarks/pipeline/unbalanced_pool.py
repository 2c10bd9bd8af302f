"""A pool made unbalanced on purpose, for `dinov3 study data`: five classes 20 times, re-encoded and cropped a little.

    python benchmarks/pipeline/unbalanced_pool.py ../shared/data /tmp/pool

writes pool.tar (caltech101-train, clothing-train, facade-train and the copies) and seeds.tar (two images of each class
of caltech101-train, which the pool then lacks). The same input gives the same files.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

from dinov3_train.counter import permutation, uniform
from dinov3_train.data.decode import decode
from dinov3_train.data.sources import open_source

SHARDS = ("caltech101-train", "clothing-train", "facade-train")
CLASSES, COPIES, SEEDS = 5, 19, 2  # classes repeated, further copies of each of their images, seed images of a class
SMALL = 60  # images that a repeated class has at most, so that the pool is not all of one class


def write_pool(data: Path, out: Path) -> tuple[int, int]:
    """Write both shards; returns the numbers of images in them."""
    out.mkdir(parents=True, exist_ok=True)
    caltech, *others = [open_source(data / f"{name}.tar") for name in SHARDS]
    by_class: dict[int, list[int]] = {}
    for number in range(len(caltech)):
        label = caltech.label(number)
        if label is not None:
            by_class.setdefault(label, []).append(number)
    small = sorted(label for label, numbers in by_class.items() if len(numbers) <= SMALL)
    repeated = {small[place] for place in permutation(0, "unbalanced pool", len(small))[:CLASSES]}
    seeds = {number for numbers in by_class.values() for number in numbers[:SEEDS]}
    counts = [0, 0]
    with tarfile.open(out / "pool.tar", "w") as pool, tarfile.open(out / "seeds.tar", "w") as trusted:
        for number in range(len(caltech)):
            label, image = caltech.label(number), caltech.read(number)
            if number in seeds:
                counts[1] += _add(trusted, f"seed-{number:05}", image, label)
                continue
            counts[0] += _add(pool, f"caltech-{number:05}", image, label)
            for copy in range(COPIES if label in repeated else 0):
                again = _again(image, number * COPIES + copy)
                counts[0] += _add(pool, f"caltech-{number:05}-{copy:02}", again, label)
        for name, source in zip(SHARDS[1:], others):
            counts[0] += sum(_add(pool, f"{name}-{n:05}", source.read(n), None) for n in range(len(source)))
    return counts[0], counts[1]


def _again(data: bytes, index: int) -> bytes:
    """The image with up to 5 % cropped from each side, as JPEG of quality 50 to 90."""
    image = decode(data)
    left, top, right, bottom, quality = uniform(0, "unbalanced pool copies", index, 5)
    box = (left * image.width, top * image.height, -right * image.width, -bottom * image.height)
    box = tuple(round(0.05 * side) for side in box)
    cropped = image.crop((box[0], box[1], image.width + box[2], image.height + box[3]))
    stream = io.BytesIO()
    cropped.save(stream, "JPEG", quality=round(50 + 40 * quality))
    return stream.getvalue()


def _add(archive: tarfile.TarFile, name: str, image: bytes, label: int | None) -> int:
    members = {"jpg": image} | ({} if label is None else {"cls": str(label).encode()})
    for suffix, data in members.items():
        entry = tarfile.TarInfo(f"{name}.{suffix}")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return 1


if __name__ == "__main__":
    images, kept = write_pool(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{sys.argv[2]}/pool.tar: {images} images, {sys.argv[2]}/seeds.tar: {kept}")
