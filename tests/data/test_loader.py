"""The stream of batches: the same bits for any workers, ranks and restarts; what is broken is named."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch
from pictures import encode, picture

from dinov3_train.config import Crops, Masking
from dinov3_train.data import loader
from dinov3_train.data.batch import CropBatch
from dinov3_train.data.loader import UnreadableCount, make_loader
from dinov3_train.data.sampler import BatchPlan, Sampler
from dinov3_train.data.sources import FileSource, open_source

CROPS = Crops(locals=2, global_size=32, local_size=16, gram_size=48)


def stream(source, *, workers: int = 0, start_step: int = 0, steps: int = 4, **plan) -> list[CropBatch]:
    batch = BatchPlan(**{"batch_size": 8, "seed": 3, **plan})
    made = make_loader(
        source, CROPS, Masking(), batch=batch, patch_size=8, start_step=start_step, steps=steps, workers=workers
    )
    assert len(made) == (steps - start_step) * batch.accumulate
    return list(made)


def equal(one: CropBatch, other: CropBatch) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(CropBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture(scope="module")
def source(photographs):
    return open_source(photographs)


@pytest.fixture(scope="module")
def reference(source) -> list[CropBatch]:
    return stream(source)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_no_bit(source, reference, workers):
    assert all(equal(a, b) for a, b in zip(reference, stream(source, workers=workers), strict=True))


def test_spawned_workers_change_no_bit(source, reference, monkeypatch):
    monkeypatch.setattr(loader.sys, "platform", "darwin")  # where workers are spawned
    assert all(equal(a, b) for a, b in zip(reference[:2], stream(source, workers=1, steps=2), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_is_the_tail(source, reference, workers):
    for start in (1, 3):  # 24 images, 8 a step: step 3 opens the second epoch
        tail = stream(source, start_step=start, workers=workers)
        assert all(equal(a, b) for a, b in zip(reference[start:], tail, strict=True))
    assert stream(source, start_step=4) == []


def test_shapes_and_contents(source, reference):
    first = reference[0]
    assert first.global_crops.shape == (2, 8, 3, 32, 32)
    assert first.local_crops.shape == (2, 8, 3, 16, 16)
    assert first.gram_crops.shape == (2, 8, 3, 48, 48)
    assert first.masks.shape == (2, 8, 16)
    assert [batch.indices.tolist() for batch in reference] == [list(range(8 * s, 8 * s + 8)) for s in range(4)]
    assert len({int(batch.masks.sum()) for batch in reference}) == 1
    assert first.mask_weights.sum() == pytest.approx(8)
    assert sorted(name for batch in reference[:3] for name in batch.names) == [source.name(n) for n in range(24)]
    order = Sampler(24, 3)
    assert first.names == tuple(source.name(order.image(index)) for index in range(8))


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_ranks_and_micro_batches_add_up_to_one_rank(source, reference, world_size, accumulate):
    ranks = [stream(source, rank=r, world_size=world_size, accumulate=accumulate, steps=2) for r in range(world_size)]
    for step in range(2):
        parts = [ranks[r][step * accumulate + m] for m in range(accumulate) for r in range(world_size)]
        whole = reference[step]
        for name in ("global_crops", "local_crops", "gram_crops", "masks"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name)), name
        assert torch.cat([part.indices for part in parts]).tolist() == whole.indices.tolist()
        assert sum((part.names for part in parts), ()) == whole.names
        for part in parts:
            assert torch.equal(part.masks.flatten().nonzero().flatten(), part.mask_indices)


def test_a_seed_changes_order_crops_and_masks(source, reference):
    other = stream(source, seed=4, steps=1)[0]
    assert other.names != reference[0].names
    assert not torch.equal(other.masks, reference[0].masks)


def test_nothing_global_is_touched(source):
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    for workers in (0, 1):
        stream(source, workers=workers, steps=1)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (np.random.get_state()[1].tobytes(), random.getstate())


def test_fewer_images_than_a_batch(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number), "PNG"))
    batch = stream(open_source(tmp_path), steps=1)[0]
    assert len(batch.names) == 8
    assert len(set(batch.names)) == 3
    assert not torch.equal(batch.global_crops[0, 0], batch.global_crops[0, 3])  # the same three images, other crops


@pytest.fixture
def broken(photographs, tmp_path):
    """The photographs, of which two are damaged and one is a link to nothing."""
    root = shutil.copytree(photographs, tmp_path / "broken")
    (root / "cat" / "004.jpg").write_bytes(b"no image")
    (root / "dog" / "008.jpg").write_bytes((root / "dog" / "008.jpg").read_bytes()[:700])
    (root / "dog" / "011.jpg").unlink()
    (root / "dog" / "011.jpg").symlink_to(root / "nowhere.jpg")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_named(broken, photographs, reference, workers):
    batches = stream(open_source(broken), workers=workers)
    skipped = {entry for batch in batches for entry in batch.skipped}
    assert {entry.split(":")[0] for entry in skipped} == {
        str(broken / name) for name in ("cat/004.jpg", "dog/008.jpg", "dog/011.jpg")
    }
    assert all("not an image" in entry for entry in skipped if "004" in entry)
    assert all("truncated" in entry for entry in skipped if "008" in entry)
    assert not any(name.endswith(("004.jpg", "008.jpg", "011.jpg")) for batch in batches for name in batch.names)
    for batch, whole in zip(batches, reference, strict=True):
        assert len(batch.names) == 8
        assert torch.equal(batch.masks, whole.masks)
        for place, (name, was) in enumerate(zip(batch.names, whole.names, strict=True)):
            same = os.path.relpath(name, broken) == os.path.relpath(was, photographs)
            assert not same or torch.equal(batch.global_crops[:, place], whole.global_crops[:, place])


def test_a_source_without_a_readable_image_ends_with_names(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"4 images in a row are unreadable, the first:\n  .*\d.jpg: not an image"):
        stream(open_source(tmp_path), steps=1)


def test_unreadable_images_are_counted_once_and_stop_the_run_above_the_limit():
    count = UnreadableCount(200, 0.01)
    assert count.add(("a: broken", "a: broken")) == ["a: broken"]
    assert count.add(("a: broken",)) == []
    assert count.add(("b: cut",)) == ["b: cut"]
    with pytest.raises(ValueError, match=r"3 of 200 .* data.max_unreadable = 0.01:\n  a: broken\n  b: cut\n  c: cut"):
        count.add(("c: cut",))
    small = UnreadableCount(10, 0.01)
    assert small.add(("a: broken",)) == ["a: broken"]  # one bad file in a small folder is said and goes on
    with pytest.raises(ValueError, match="2 of 10"):
        small.add(("b: cut",))
    with pytest.raises(ValueError, match="1 of 10"):
        UnreadableCount(10, 0.0).add(("a: broken",))


class _Fatal(FileSource):
    def read(self, index: int) -> bytes:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_dead_worker_is_one_clear_line(source):
    fatal = _Fatal([source.name(n) for n in range(24)], [None] * 24, None)
    with pytest.raises(
        RuntimeError, match=r"loader: a worker process died while micro-batch 0 .* fewer data.workers"
    ) as raised:
        stream(fatal, workers=1, steps=1)
    assert "\n" not in str(raised.value)


def test_workers_leave_signals_to_the_main_process(source):
    batch = BatchPlan(batch_size=4)
    made = make_loader(source, CROPS, Masking(), batch=batch, patch_size=8, start_step=0, steps=6, workers=2)
    for number, _ in enumerate(made):
        if number == 0:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGTERM)
                os.kill(child.pid, signal.SIGINT)
    assert number == 5


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        (Crops(global_size=30), r"crops.global_size: .* 8 \(nearest: 24 or 32\), got 30"),
        (Crops(global_size=32, local_size=20), "crops.local_size"),
        (Crops(global_size=32, local_size=16, gram_size=50), "crops.gram_size"),
    ],
)
def test_sides_that_do_not_divide(source, crops, message):
    with pytest.raises(ValueError, match=message):
        make_loader(
            source, crops, Masking(), batch=BatchPlan(batch_size=4), patch_size=8, start_step=0, steps=1, workers=0
        )


def test_real_shards_with_two_workers_equal_none(shared_data):
    shard = open_source(shared_data / "caltech101-train.tar")
    assert len(shard) == 3974
    assert sum(shard.label(n) is None for n in range(len(shard))) == 467
    assert all(equal(a, b) for a, b in zip(stream(shard, steps=2), stream(shard, steps=2, workers=2), strict=True))
