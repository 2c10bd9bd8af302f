"""The Parquet manifest: written whole or not at all, read back, and what is wrong with it named."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dinov3_train.data.manifest import (
    SCHEMA,
    absolute_spec,
    content_hash,
    manifest_settings,
    read_manifest,
    write_manifest,
)


def block(source: str, names: list[str], **changes) -> dict:
    """The columns of images 0 to n - 1 of `source`."""
    count = len(names)
    columns = {
        "source": [source] * count,
        "index": list(range(count)),
        "name": names,
        "width": [72] * count,
        "height": [56] * count,
        "hash": [content_hash(os.fsencode(name)) for name in names],
        "cluster_path": [[number // 2, number] for number in range(count)],
        "retrieval_seed": [""] * count,
        "duplicate_group": [-1] * count,
        "part": ["clustering"] * count,
    }
    return columns | changes


def test_written_and_read_back(tmp_path):
    blocks = [block("/a", ["/a/1.jpg", "/a/2.jpg"]), block("/b", ["/b/1.jpg"], part=["raw"], cluster_path=[[]])]
    path = write_manifest(tmp_path / "new" / "m.parquet", blocks, {"target": 3, "levels": [2, 1]})
    table = read_manifest(path)
    assert table.schema.equals(SCHEMA)
    assert table.to_pydict() == {name: blocks[0][name] + blocks[1][name] for name in SCHEMA.names}
    assert read_manifest(path, ["part", "index"]).to_pydict() == {
        "part": ["clustering", "clustering", "raw"],
        "index": [0, 1, 0],
    }
    assert manifest_settings(path) == {"target": 3, "levels": [2, 1]}
    assert [entry.name for entry in path.parent.iterdir()] == ["m.parquet"]


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_manifest("m.parquet", [block("photos", ["photos/1.jpg"])], {})
    assert read_manifest(path, ["source", "name"]).to_pylist() == [
        {"source": f"{tmp_path}/photos", "name": f"{tmp_path}/photos/1.jpg"}
    ]
    assert absolute_spec("a-{0..1}.tar,/b.tar") == f"{tmp_path}/a-{{0..1}}.tar,/b.tar"
    assert absolute_spec("s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert absolute_spec("torchvision:CIFAR10:root=x:train=true") == f"torchvision:CIFAR10:root={tmp_path}/x:train=true"


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", [block("/a", ["/a/1.jpg"])], {})
    before = path.read_bytes()

    def blocks():
        yield block("/a", ["/a/1.jpg"])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_manifest(path, blocks(), {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.parquet"]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file that ends in .parquet, got .*m.csv"):
        write_manifest(tmp_path / "m.csv", [], {})
    with pytest.raises(ValueError, match="expected the columns source, index"):
        write_manifest(tmp_path / "m.parquet", [{"source": ["a"]}], {})
    with pytest.raises(ValueError, match="does not fit its column"):
        write_manifest(tmp_path / "m.parquet", [block("/a", ["/a/1.jpg"], index=["one"])], {})


def test_what_cannot_be_read(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", [block("/a", ["/a/1.jpg"])], {})
    with pytest.raises(ValueError, match=r"gone.parquet does not exist"):
        read_manifest(tmp_path / "gone.parquet")
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-30])
    (tmp_path / "text.parquet").write_text("hello")
    for name in ("cut", "text"):
        with pytest.raises(ValueError, match=rf"{name}.parquet is no readable Parquet file") as raised:
            read_manifest(tmp_path / f"{name}.parquet")
        assert "\n" not in str(raised.value)
    parquet.write_table(pa.table({"index": [1], "other": [2]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other.parquet lacks the columns source, name.*it has index, other"):
        read_manifest(tmp_path / "other.parquet")
    parquet.write_table(pa.table({"index": ["one"]}), tmp_path / "typed.parquet")
    with pytest.raises(ValueError, match=r"typed.parquet cannot be read"):
        read_manifest(tmp_path / "typed.parquet", ["index"])
    assert manifest_settings(tmp_path / "other.parquet") == {}


def test_names_that_are_not_utf8_are_written_escaped(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", [block("/a", ["/a/caf\udce9.jpg"])], {})
    assert read_manifest(path, ["name"]).to_pydict() == {"name": ["/a/caf\\udce9.jpg"]}
