"""A manifest as a source: the images it names and no others, and what has changed since it was written."""

from __future__ import annotations

import os
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_manifest import block

from dinov3_train.config import Data
from dinov3_train.data.manifest import write_manifest
from dinov3_train.data.mixture import MixedSource, open_data
from dinov3_train.data.sources import open_source


def rows(spec: str, numbers: list[int], **changes) -> dict:
    """The columns of some images of a source."""
    source = open_source(spec)
    return block(spec, [source.name(number) for number in numbers], index=numbers, **changes)


@pytest.fixture
def pool(tmp_path, photographs):
    """A folder of this test's own."""
    return shutil.copytree(photographs, tmp_path / "pool")


@pytest.fixture
def manifest(pool, shards, tmp_path):
    """Five images of a folder as the part "clustering", three of shards as "retrieval", in no order of sources."""
    shard_spec = f"{shards}/part-{{000..002}}.tar"
    blocks = [
        rows(str(pool), [20, 3, 4]),
        rows(shard_spec, [11, 0, 5], part=["retrieval"] * 3),
        rows(str(pool), [0, 9]),
    ]
    return write_manifest(tmp_path / "m.parquet", blocks, {})


def test_the_images_it_names(manifest, pool, shards):
    source, folder, tar = open_source(manifest), open_source(pool), open_source(f"{shards}/part-*.tar")
    assert len(source) == 8
    wanted = [(folder, 20), (folder, 3), (folder, 4), (tar, 11), (tar, 0), (tar, 5), (folder, 0), (folder, 9)]
    for number, (origin, index) in enumerate(wanted):
        assert source.name(number) == origin.name(index)
        assert source.read(number) == origin.read(index)
    assert source.read_extra(3, "json") == b'{"number": 11}'
    assert source.field(3, "number") == 11
    with pytest.raises(IndexError, match="8 is outside 0 to 7"):
        source.name(8)
    with pytest.raises(IndexError):
        source.read(-1)


def test_one_part_and_labels(manifest, pool):
    retrieval = open_source(f"{manifest}:part=retrieval")
    assert [retrieval.label(number) for number in range(3)] == [1, 0, 0]  # 11 % 5, 0, 5 % 5
    clustering = open_source(f"{manifest}:part=clustering")
    assert clustering.classes == ["bird", "cat", "dog"]
    for number in range(5):
        assert clustering.name(number).split(os.sep)[-2] == clustering.classes[clustering.label(number)]
    with pytest.raises(ValueError, match="has no part 'raw'; its parts: clustering, retrieval"):
        open_source(f"{manifest}:part=raw")


def test_its_sources_are_opened_when_an_image_is_read(manifest, pool):
    shutil.rmtree(pool)
    source = open_source(manifest)
    assert len(source) == 8
    assert source.name(0).startswith(str(pool))
    with pytest.raises(ValueError, match=r"a source that the manifest .*m.parquet names cannot be opened: .*pool") as e:
        source.read(0)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="cannot be opened"):  # a run asks before it starts
        open_data(Data(sources=(str(manifest),)))


def test_a_source_that_has_changed(manifest, pool):
    (pool / "bird" / "000.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"pool has changed since .*m.parquet was written: image \d+ was .*, it now has"
    ):
        open_source(manifest).ready()
    for path in sorted(pool.rglob("*.jpg"))[10:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"image 20 was .*, it now has 10 images; restore it, or curate again"):
        open_source(manifest).ready()


def test_wrong_manifests(tmp_path, pool, manifest):
    with pytest.raises(ValueError, match=r"n.parquet does not exist; .* holds m.parquet"):
        open_source(tmp_path / "n.parquet")
    (tmp_path / "bad.parquet").write_bytes(manifest.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"bad.parquet is no readable Parquet file"):
        open_source(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        open_source(write_manifest(tmp_path / "empty.parquet", [], {}))
    with pytest.raises(ValueError, match="has 1 rows without index"):
        open_source(write_manifest(tmp_path / "null.parquet", [block(str(pool), ["a", "b"], index=[0, None])], {}))
    with pytest.raises(ValueError, match=r"image -1 was .*"):
        open_source(write_manifest(tmp_path / "neg.parquet", [block(str(pool), ["a"], index=[-1])], {})).ready()
    itself = tmp_path / "self.parquet"
    with pytest.raises(ValueError, match="names itself"):
        open_source(write_manifest(itself, [block(str(itself), ["a"])], {})).ready()


def test_it_survives_pickling_and_mixes(manifest, shards):
    source = open_source(manifest).ready()
    assert pickle.loads(pickle.dumps(source)).read(5) == source.read(5)
    both = open_source(f"{manifest},{shards}/part-000.tar")
    assert len(both) == 12
    assert both.read(9) == open_source(shards / "part-000.tar").read(1)
    parts = (f"{manifest}:part=clustering", f"{manifest}:part=retrieval")
    mix = open_data(Data(sources=parts, weights=(3.0, 1.0), homogeneous=("m:retrieval",), homogeneous_share=0.1))
    assert isinstance(mix, MixedSource)
    assert (mix.names, mix.sizes) == (("m:clustering", "m:retrieval"), (5, 3))


def test_a_manifest_of_a_manifest(manifest, tmp_path):
    second = write_manifest(tmp_path / "second.parquet", [rows(str(manifest), [7, 3])], {})
    assert open_source(second).read(1) == open_source(manifest).read(3)


def test_it_works_from_another_folder(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_manifest("relative.parquet", [rows("pool", [1, 2])], {})
    os.makedirs("elsewhere")
    monkeypatch.chdir("elsewhere")
    assert open_source(f"../{path}").read(0) == open_source(pool).read(1)


def test_fields_are_its_columns_whoever_added_them_else_what_the_source_says(manifest, tmp_path):
    table = pq.read_table(manifest)
    table = table.append_column("region", pa.array(["north", None, *"abcdef"]))
    odd = [[1, 2], []] + [[3]] * 6
    table = table.set_column(
        table.column_names.index("cluster_path"), "cluster_path", pa.array(odd, pa.list_(pa.int32()))
    )
    path = tmp_path / "more.parquet"
    pq.write_table(table, path)
    source = open_source(path)
    assert [source.field(number, "region") for number in range(4)] == ["north", None, "a", "b"]
    assert source.field(4, "part") == "retrieval"
    assert [source.field(number, "cluster_path") for number in range(3)] == ["1/2", None, "3"]
    assert source.field(3, "number") == 11  # of the image's .json
    assert source.field(0, "number") is None
    retrieval = open_source(f"{path}:part=retrieval")
    assert [retrieval.field(number, "region") for number in range(3)] == ["b", "c", "d"]
    assert pickle.loads(pickle.dumps(source)).field(0, "region") == "north"
