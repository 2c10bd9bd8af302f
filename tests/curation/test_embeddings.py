"""Shards on disk: rows by number, finished or not, cut, damaged, bare .npy files."""

import numpy as np
import pytest
import torch

from dinov3_train.curation.embeddings import Embeddings, shard_file
from dinov3_train.curation.files import claim, read_json, whole, write_array


def test_rows_across_shards_are_those_written(blobs, write_pool, tmp_path):
    rows, _ = blobs([250])
    found = write_pool(tmp_path, rows, shard_rows=60)
    assert (len(found), found.dim) == (250, 16)
    for wanted in ([0], [59, 60], range(250), [3, 61, 62, 63, 180, 249], range(50, 130)):
        numbers = np.array(list(wanted))
        assert torch.equal(found.take(numbers), torch.from_numpy(rows[numbers]).float())
    assert found.take(np.empty(0, dtype=np.int64)).shape == (0, 16)
    assert found.table(["name"])["name"].to_pylist()[61] == "/pool/61.jpg"
    found.verify()
    assert found.fingerprint == Embeddings(tmp_path).fingerprint
    assert found.fingerprint != write_pool(tmp_path / "other", rows[::-1], shard_rows=60).fingerprint


def test_a_shard_that_is_cut_damaged_or_missing(blobs, write_pool, tmp_path):
    rows, _ = blobs([250])
    file = write_pool(tmp_path, rows).files[1]
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="shard_000001.npy is missing, cut or damaged"):
        Embeddings(tmp_path)
    file.write_bytes(data[:1000] + b"\1\2\3" + data[1003:])
    with pytest.raises(ValueError, match="shard_000001.npy does not agree with its checksum; the curate embed command"):
        Embeddings(tmp_path).verify()
    Embeddings(tmp_path).verify(rank=0, world_size=2)  # shards 0 and 2
    with pytest.raises(ValueError, match="checksum"):
        Embeddings(tmp_path).verify(rank=1, world_size=2)
    file.write_bytes(data)
    file.with_suffix(".parquet").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 shards .the first is shard_000001.npy.; the same curate embed"):
        Embeddings(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="expected a folder of embeddings"):
        Embeddings(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no .npy shards"):
        Embeddings(tmp_path)


def test_bare_arrays_serve_too(tmp_path):
    write_array(tmp_path / "a.npy", np.ones((3, 4), dtype=np.float32))
    write_array(tmp_path / "b.npy", np.zeros((2, 4), dtype=np.float16))
    found = Embeddings(tmp_path)
    assert found.take(np.arange(5))[:, 0].tolist() == [1, 1, 1, 0, 0]
    assert not found.indexed
    write_array(tmp_path / "c.npy", np.zeros((2, 5), dtype=np.float16))
    with pytest.raises(ValueError, match="c.npy has width 5, expected 4"):
        Embeddings(tmp_path)
    write_array(tmp_path / "c.npy", np.zeros((2, 4), dtype=np.int64))
    with pytest.raises(ValueError, match="expected fp16 or fp32 .n, D., got int64"):
        Embeddings(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value, blobs, write_pool, tmp_path):
    rows, _ = blobs([150])
    rows[120, 7] = value
    found = write_pool(tmp_path, rows)
    assert torch.isfinite(found.take(np.arange(120))).all()
    with pytest.raises(ValueError, match="1 of 40 embeddings read are NaN or infinite, the first in row 120"):
        found.take(np.arange(110, 150))


def test_a_file_is_whole_or_absent(tmp_path):
    write_array(tmp_path / "x.npy", np.arange(3))

    def fill() -> None:
        with whole(tmp_path / "x.npy") as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="cannot write .*x.npy .No space left on device.; what was finished"):
        fill()
    assert np.load(tmp_path / "x.npy").tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_a_folder_belongs_to_one_call(tmp_path):
    claim(tmp_path / "a", {"k": (1, 2), "seed": 0}, "stage")
    claim(tmp_path / "a", {"k": (1, 2), "seed": 0}, "stage")
    assert read_json(tmp_path / "a" / "settings.json") == {"k": [1, 2], "seed": 0}
    with pytest.raises(ValueError, match="stage: out=.* was made with other settings .seed: 0 there, 1 now"):
        claim(tmp_path / "a", {"k": (1, 2), "seed": 1}, "stage")
    (tmp_path / "a" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json cannot be read"):
        claim(tmp_path / "a", {}, "stage")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        claim(shard_file(_with_file(tmp_path), 0), {}, "stage")


def _with_file(path):
    shard_file(path, 0).write_text("")
    return path
