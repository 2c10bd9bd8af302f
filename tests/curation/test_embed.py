"""Embedding: unit rows of every readable image, restarts to the bit, ranks, sources that change, a full disk."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov3_train.curation.embed import EmbedSettings, Pool, embed, open_pool
from dinov3_train.curation.embeddings import Embeddings, index_file, shard_file
from dinov3_train.curation.kmeans import Where
from dinov3_train.data.manifest import content_hash
from dinov3_train.data.sources import open_source
from dinov3_train.evaluation.view import View

VIEW = View(size=16)
SETTINGS = EmbedSettings(shard_rows=8, batch_size=3)


class Colours(nn.Module):
    """CLS = colours of the four corners."""

    embed_dim = 12
    patch_size = 8

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.calls = 0

    def features(self, images):
        """Images (S, 3, Y, X) normalised."""
        self.calls += 1
        found = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) * self.gain
        return type("F", (), {"cls": found, "patches": found[:, None]})


@pytest.fixture
def folders(tmp_path):
    """13 and 7 images in two folders, one of them damaged."""
    rng = np.random.default_rng(0)
    for name, count in (("a", 13), ("b", 7)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 255, (20, 24 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number:02d}.png")
    (tmp_path / "a" / "05.png").write_bytes(b"no image")
    return tmp_path


def run(folders, out, backbone=None, settings=SETTINGS, where=None, say=print):
    images = open_pool([str(folders / "a"), str(folders / "b")], open_source)
    return embed(backbone or Colours(), images, VIEW, out, settings=settings, where=where or Where(), say=say)


def test_rows_are_unit_features_with_their_images(folders, tmp_path):
    lost = run(folders, tmp_path / "out")
    assert lost == [f"{folders / 'a' / '05.png'}: not an image of a known kind"]
    found = Embeddings(tmp_path / "out")
    assert len(found) == 19
    table = found.table()
    assert [len(np.load(file)) for file in found.files] == [7, 8, 4]
    for row, entry in enumerate(table.to_pylist()):
        source = open_source(entry["source"])
        data = source.read(entry["index"])
        assert source.name(entry["index"]) == entry["name"]
        assert content_hash(data) == entry["hash"]
        picture = Image.open(io.BytesIO(data))
        assert picture.size == (entry["width"], entry["height"])
        expected = Colours().features(VIEW.normalized(VIEW.pixels(picture.convert("RGB"))[None])).cls
        torch.testing.assert_close(
            found.take(np.array([row])), nn.functional.normalize(expected).detach(), rtol=0, atol=2e-3
        )


def shards(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix == ".npy"}


def test_a_restart_makes_only_what_is_missing_or_damaged(folders, tmp_path):
    run(folders, tmp_path / "whole")
    run(folders, tmp_path / "out")
    index_file(tmp_path / "out", 1).unlink()  # killed between the two files
    shard_file(tmp_path / "out", 2).write_bytes(b"half a file")
    backbone, said, seen = Colours(), [], []
    where = Where(progress=lambda *each: seen.append(each))
    lost = run(folders, tmp_path / "out", backbone, where=where, say=said.append)
    assert backbone.calls == 3 + 2
    assert said == [f"{name} is unfinished or damaged: made again" for name in ("shard_000001.npy", "shard_000002.npy")]
    assert seen[-1] == (20, 20)
    assert len(lost) == 1  # that of the shard which was kept, too
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    backbone = Colours()
    run(folders, tmp_path / "out", backbone)
    assert backbone.calls == 0


def test_ranks_make_the_same_shards(folders, tmp_path, on_ranks):
    """And each knows the unreadable images of all."""
    lost = run(folders, tmp_path / "one")
    found = on_ranks(2, lambda c: run(folders, tmp_path / "two", where=Where(collectives=c)))
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert found == [lost, lost]


def test_another_backbone_or_view_may_not_go_on(folders, tmp_path):
    run(folders, tmp_path / "out")
    other = Colours()
    other.gain.data.fill_(2)
    with pytest.raises(ValueError, match="was made with other settings .weights:"):
        run(folders, tmp_path / "out", other)
    with pytest.raises(ValueError, match="pooling: 'cls' there, 'patch_mean' now"):
        run(folders, tmp_path / "out", settings=EmbedSettings(shard_rows=8, batch_size=3, pooling="patch_mean"))


def test_a_source_that_has_changed(folders, tmp_path):
    run(folders, tmp_path / "out")
    (folders / "a" / "00.png").rename(folders / "a" / "99.png")
    with pytest.raises(ValueError, match="a has changed since shard 0 of .*: image 0 was .*00.png, is .*01.png"):
        run(folders, tmp_path / "out")


def test_too_many_unreadable(folders, tmp_path):
    (folders / "b" / "01.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 20 images are unreadable, more than .*max_unreadable = 0.01: .*05.png"):
        run(folders, tmp_path / "out")
    (folders / "b" / "02.png").unlink()
    run(folders, tmp_path / "more", settings=EmbedSettings(shard_rows=8, max_unreadable=0.2))


def test_features_that_are_not_finite(folders, tmp_path):
    backbone = Colours()
    backbone.gain.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the backbone gives NaN or infinite features for .*00.png"):
        run(folders, tmp_path / "out", backbone)


def test_a_full_disk_keeps_what_is_finished(folders, tmp_path, monkeypatch):
    """The second shard does not fit; once there is room the same call ends as if nothing had happened."""
    run(folders, tmp_path / "whole")
    saved = np.save
    calls = []

    def full(file, array):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"some bytes")
            raise OSError(28, "No space left on device")
        saved(file, array)

    monkeypatch.setattr("dinov3_train.curation.files.np.save", full)
    with pytest.raises(OSError, match="cannot write .*shard_000001.npy .No space left on device.; what was finished"):
        run(folders, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "settings.json", "shard_000000.npy", "shard_000000.parquet",
    ]  # fmt: skip
    monkeypatch.setattr("dinov3_train.curation.files.np.save", saved)
    run(folders, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"pooling": "max"}, "pooling expects one of cls, patch_mean, cls\\+patch, got 'max'"),
        ({"precision": "fp8"}, "precision expects one of"),
        ({"shard_rows": 0}, "shard_rows expects at least 1, got 0"),
        ({"max_unreadable": 2}, "max_unreadable is a share from 0 to 1, got 2"),
    ],
)
def test_wrong_settings(wrong, text):
    with pytest.raises(ValueError, match=text):
        EmbedSettings(**wrong)


def test_numbers_of_a_pool_go_through_its_sources():
    pool = Pool(("x", "y"), ([1, 2, 3], [4]))
    assert [pool.find(number) for number in range(4)] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    with pytest.raises(IndexError):
        pool.find(4)
