"""The page of `dinov3 curate report`: its numbers, its pictures, and what is left out when a stage was not run."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dinov3_train.curation.curated import Curated
from dinov3_train.curation.page import SHEET, curation_page, effective
from dinov3_train.curation.tiles import GAP, GREY, RING, TILE, Tiles, sheet
from dinov3_train.data.manifest import SCHEMA
from dinov3_train.data.sources import open_source

COLOURS = {0: (200, 30, 30), 1: (30, 160, 40), 2: (30, 60, 210)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 images: 40 red ones of cluster 0, 15 green of cluster 1, 5 blue of cluster 2."""
    root = tmp_path_factory.mktemp("pool")
    for number in range(60):
        colour = COLOURS[0 if number < 40 else 1 if number < 55 else 2]
        Image.new("RGB", (50, 40), colour).save(root / f"{number:02}.png")
    return root


def manifest_of(folder, rows, **changes) -> pa.Table:
    columns = {
        "source": [str(folder)] * len(rows),
        "index": rows,
        "name": [f"{folder}/{row:02}.png" for row in rows],
        "width": [50] * len(rows),
        "height": [40] * len(rows),
        "hash": [""] * len(rows),
        "cluster_path": [[0, 0]] * len(rows),
        "retrieval_seed": [""] * len(rows),
        "duplicate_group": [-1] * len(rows),
        "part": ["clustering"] * len(rows),
    }
    return pa.table(columns | changes, schema=SCHEMA)


@pytest.fixture
def curated(folder) -> Curated:
    """Ten red and ten green images are kept, no blue one; images 1 and 2 are duplicates of 0."""
    labels = np.repeat([0, 1, 2], [40, 15, 5]).astype(np.int32)
    paths = np.stack([labels // 2, labels], axis=1)
    groups, removed = np.full(60, -1), np.zeros(60, dtype=bool)
    groups[:3], removed[1:3] = 7, True
    paths[1:3] = -1
    kept = [0, *range(10, 19), *range(40, 50)]
    seeds = [f"{folder}/58.png"] * 4 + [""] * 16
    pool = pa.table(
        {"source": [str(folder)] * 60, "index": range(60), "name": [f"{folder}/{n:02}.png" for n in range(60)]}
    )
    manifest = manifest_of(folder, kept, retrieval_seed=seeds, part=["retrieval"] * 4 + ["clustering"] * 16)
    settings = {"target": 20, "cluster": {"clusters": [3, 2]}}
    return Curated(pool, manifest, settings, paths, groups, removed, (str(folder),))


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'<img src="data:image/[a-z]+;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA") for data in found]


def tile_colour(picture: Image.Image, place: int) -> tuple[int, ...]:
    """RGB in the middle of a tile, none where the paper shows through."""
    step = TILE + GAP
    red, green, blue, alpha = picture.getpixel((place % 6 * step + TILE // 2, place // 6 * step + TILE // 2))
    return (red, green, blue) if alpha else ()


def near(one, other) -> bool:
    return bool(one) and max(abs(a - b) for a, b in zip(one[:3], other)) < 12


def test_the_numbers_and_tables(curated, folder):
    html = curation_page(curated, open_source).html()
    assert "20 images kept of 60 from 1 source." in html
    for number, name in (("60", "images in the pool"), ("20", "images kept"), ("2", "duplicates removed")):
        assert f"<b>{number}</b><span>{name}</span>" in html
    # the removed duplicates count before, in the cluster of the image that stayed
    assert "<td>1 (images)</td><td>before</td><td>3</td><td>2</td><td>40</td><td>15</td><td>5</td>" in html
    assert "<td></td><td>after</td><td>2</td><td>2</td><td>10</td><td>10</td><td>10</td>" in html
    assert "<td>clustering</td><td>16</td><td>80.0 %</td>" in html
    assert f"<td>{folder}</td><td>60</td><td>20</td><td>100.0 %</td><td>100.0 %</td>" in html
    assert "<td>cluster.clusters</td><td>3, 2</td>" in html
    assert "http" not in html.replace("http://www.w3.org", "")  # nothing is loaded from elsewhere


def test_the_sheets_of_clusters(curated):
    html = curation_page(curated, open_source).html()
    captions = re.findall(r"<figcaption>(cluster [^<]*)</figcaption>", html)
    assert captions == [
        "cluster 0/0: 40 images, 10 kept",
        "cluster 0/1: 15 images, 10 kept",
        "cluster 1/2: 5 images, 0 kept",
    ]
    red, green, blue = pictures(html)[:3]
    assert [near(tile_colour(red, place), COLOURS[0]) for place in range(12)] == [True] * 3 + [False] * 9
    assert [near(tile_colour(green, place), COLOURS[1]) for place in range(12)] == [True] * 8 + [False] * 4
    assert not any(near(tile_colour(blue, place), COLOURS[2]) for place in range(5))
    assert tile_colour(blue, 5) == ()


def test_the_rows_of_neighbours_and_duplicates(curated):
    html = curation_page(curated, open_source).html()
    assert "4 images were retrieved for 1 seeds" in html
    assert re.search(r"<figcaption>[^<]*/58.png: 4 retrieved", html)
    assert "<figcaption>group 7: 3 images, 2 removed" in html
    neighbours, duplicates = pictures(html)[3:5]
    assert near(tile_colour(neighbours, 0), COLOURS[2])
    assert near(tile_colour(neighbours, 1), COLOURS[0])
    assert near(neighbours.getpixel((2, 50)), RING)
    assert near(duplicates.getpixel((2, 50)), RING)
    assert not near(duplicates.getpixel((TILE + GAP + 2, 50)), RING)


def test_the_same_page_twice(curated):
    assert curation_page(curated, open_source).html() == curation_page(curated, open_source).html()


def test_a_manifest_alone(curated, folder):
    alone = Curated(None, manifest_of(folder, [0, 41]), {}, np.array([[0, 0], [0, 1]], dtype=np.int32))
    html = curation_page(alone, open_source).html()
    assert "only what was kept" in html
    assert "before" not in html
    assert "the manifest says nothing" in html
    assert "Duplicates" not in html
    assert "cluster 0/1: 1 images, 1 kept" in html


def test_images_that_cannot_be_read_are_grey(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    tiles = Tiles(open_source)
    assert tiles.tile(str(tmp_path), 0).getpixel((5, 5)) == GREY
    assert tiles.tile(str(folder), 0).size == (TILE, TILE)
    with pytest.raises(ValueError, match="absent"):
        tiles.tile(str(tmp_path / "absent"), 0)


def test_a_sheet_has_lines_of_six():
    tile = Image.new("RGB", (TILE, TILE), COLOURS[1])
    assert sheet([(tile, "plain")] * 7).size == (6 * (TILE + GAP) - GAP, 2 * (TILE + GAP) - GAP)
    assert SHEET % 6 == 0


def test_the_effective_number():
    assert effective(np.array([5, 5, 5, 0])) == pytest.approx(3.0)
    assert effective(np.array([9])) == 1.0
    assert effective(np.array([0])) == 0.0
