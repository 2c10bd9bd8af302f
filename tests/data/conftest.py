"""Small synthetic photographs in the shapes that sources come in."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import encode, picture, write_tar
from PIL import Image


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder with 24 JPEGs in the classes bird, cat, dog."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(24):
        folder = root / ("bird", "cat", "dog")[number % 3]
        folder.mkdir(exist_ok=True)
        (folder / f"{number:03}.jpg").write_bytes(encode(picture(number)))
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with the shards part-000.tar to part-002.tar, 4 samples each: image, .cls, .mask.png, .json."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members = {}
        for number in range(4 * shard, 4 * shard + 4):
            members[f"deep/{number:04}.cls"] = str(number % 5).encode()
            members[f"deep/{number:04}.{'JPG' if number % 2 else 'jpeg'}"] = encode(picture(number))
            members[f"deep/{number:04}.mask.png"] = encode(Image.new("L", (8, 8), number), "PNG")
            members[f"deep/{number:04}.json"] = b'{"number": %d}' % number
        write_tar(root / f"part-{shard:03}.tar", members)
    return root
