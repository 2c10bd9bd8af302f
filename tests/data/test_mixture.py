"""Which source and image a sample is: shares, homogeneous steps, epochs without replacement, no matter who asks."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from pictures import encode, picture

from dinov3_train.config import Crops, Data, Masking
from dinov3_train.data.batch import CropBatch
from dinov3_train.data.loader import make_loader
from dinov3_train.data.mixture import MixedSampler, MixedSource, draw_counts, mixture_lines, open_data, short_names
from dinov3_train.data.sampler import BatchPlan, Sampler
from dinov3_train.data.sources import FileSource, open_source

SIZES = (700, 90, 11)
WEIGHTS = (5.0, 2.0, 1.0)
BATCH = 12  # 7.5, 3 and 1.5 images of a mixed step


def mixed(sizes=SIZES, **settings) -> MixedSource:
    """Sources of files that do not exist, for what needs their numbers only."""
    sources = [FileSource([f"{n}/{k}" for k in range(size)], [None] * size, None) for n, size in enumerate(sizes)]
    settings = {"weights": WEIGHTS, "homogeneous": (1, 2), "homogeneous_share": 0.2} | settings
    return MixedSource(sources, names=[f"s{n}" for n in range(len(sizes))], **settings)


def drawn(sampler: MixedSampler, source: MixedSource, steps: range) -> tuple[np.ndarray, np.ndarray]:
    """Source and number in it of every sample: int64 (steps, BATCH) each."""
    images = np.array([sampler.image(step * BATCH + place) for step in steps for place in range(BATCH)])
    ends = np.cumsum(source.sizes)
    which = np.searchsorted(ends, images, side="right")
    return which.reshape(-1, BATCH), (images - (ends - source.sizes)[which]).reshape(-1, BATCH)


@pytest.fixture(scope="module")
def stream():
    source = mixed()
    return source, *drawn(source.sampler(7, BATCH), source, range(3000))


def binomial_bound(trials: int, share: float) -> float:
    """Five standard deviations: a fair draw passes it about once in two million times."""
    return 5.0 * math.sqrt(trials * share * (1.0 - share))


def test_the_share_of_homogeneous_steps(stream):
    _, which, _ = stream
    alone = (which == which[:, :1]).all(axis=1)
    assert abs(alone.sum() - 0.2 * len(which)) < binomial_bound(len(which), 0.2)
    named = which[alone, 0]
    assert set(named.tolist()) == {1, 2}  # source 0 has none
    assert abs((named == 1).sum() - len(named) * 90 / 101) < binomial_bound(len(named), 90 / 101)
    assert alone.sum() == sum(MixedSource.sampler(stream[0], 7, BATCH).drawn(3000).homogeneous_steps)


def test_the_shares_of_mixed_steps(stream):
    _, which, _ = stream
    mixed_steps = which[(which != which[:, :1]).any(axis=1)]
    for source, share in enumerate(np.array(WEIGHTS) / sum(WEIGHTS)):
        counts = (mixed_steps == source).sum(axis=1)
        assert set(counts.tolist()) <= {math.floor(share * BATCH), math.ceil(share * BATCH)}
        assert abs(counts.sum() - share * mixed_steps.size) < binomial_bound(mixed_steps.size, share)
        # no place in the batch, and so no rank, is any source's own
        by_place = (mixed_steps == source).sum(axis=0)
        assert (abs(by_place - share * len(mixed_steps)) < binomial_bound(len(mixed_steps), share)).all()
        # sources are told apart by chance, not in turn: neighbours in time are independent
        pairs = (mixed_steps[:-1, 0] == source) & (mixed_steps[1:, 0] == source)
        assert abs(pairs.sum() - share**2 * len(pairs)) < 2 * binomial_bound(len(pairs), share**2)


def test_each_source_is_drawn_without_replacement_epoch_by_epoch(stream):
    source, which, number = stream
    for s, size in enumerate(source.sizes):
        order = number[which == s]
        epochs = [order[first : first + size] for first in range(0, len(order) - size + 1, size)]
        assert len(epochs) >= 10
        assert all(np.array_equal(np.sort(epoch), np.arange(size)) for epoch in epochs)
        assert not any(np.array_equal(one, other) for one, other in itertools.pairwise(epochs))


def test_two_sources_of_one_size_have_orders_of_their_own():
    source = mixed((50, 50), weights=(1.0, 1.0), homogeneous=(), homogeneous_share=0.0)
    which, number = drawn(source.sampler(0, BATCH), source, range(8))
    assert number[which == 0][:40].tolist() != number[which == 1][:40].tolist()


def test_a_sample_is_the_same_whoever_asks_and_when(stream):
    source, which, number = stream
    firsts = np.cumsum([0, *source.sizes[:-1]])
    sampler = source.sampler(7, BATCH)
    for index in np.random.default_rng(0).permutation(3000 * BATCH)[:2000].tolist():
        step, place = divmod(index, BATCH)
        assert sampler.image(index) == firsts[which[step, place]] + number[step, place]
    other, _ = drawn(source.sampler(8, BATCH), source, range(100))
    assert not np.array_equal(other, which[:100])


def test_running_sums_count_what_is_drawn_across_blocks():
    source = mixed()
    sampler = source.sampler(7, BATCH)
    far = sampler.drawn(10_000)  # over two borders of blocks
    for first, last in ((0, 5), (4090, 4100), (8190, 8195), (3, 4)):
        which, _ = drawn(sampler, source, range(first, last))
        counted = [(which == s).sum() for s in range(3)]
        assert (sampler.drawn(last).images - sampler.drawn(first).images).tolist() == counted
    assert sampler.drawn(10_000).images.tolist() == far.images.tolist()
    assert sampler.drawn(10_000).images.sum() == 10_000 * BATCH
    assert sampler.drawn(0).images.tolist() == [0, 0, 0]


def test_a_resume_late_in_a_long_run_starts_at_once():
    source, began = mixed(), time.process_time()
    sampler = source.sampler(7, BATCH)
    assert sampler.image(1_000_003 * BATCH) < sum(SIZES)
    assert time.process_time() - began < 20  # measured 1 s; the bound only catches a loop over the samples


def test_without_weights_every_image_is_equal():
    source = mixed(weights=(), homogeneous=(2,), homogeneous_share=0.5)
    assert source.weights == SIZES
    images = source.sampler(0, BATCH).drawn(4000)
    assert images.homogeneous_steps.tolist()[:2] == [0, 0]
    assert abs(images.homogeneous_steps[2] - 2000) < binomial_bound(4000, 0.5)
    mixed_images = images.images - images.homogeneous_steps * BATCH
    assert mixed_images.sum() == (4000 - images.homogeneous_steps.sum()) * BATCH
    assert abs(mixed_images[0] / mixed_images.sum() - 700 / 801) < 0.01


def test_all_steps_homogeneous_and_weight_zero():
    source = mixed(weights=(1.0, 0.0, 0.0), homogeneous=(1,), homogeneous_share=1.0)
    assert source.sampler(0, BATCH).drawn(50).images.tolist() == [0, 600, 0]
    source = mixed(weights=(0.0, 1.0, 0.0), homogeneous=(), homogeneous_share=0.0)
    assert source.sampler(0, BATCH).drawn(50).images.tolist() == [0, 600, 0]


def test_a_source_smaller_than_its_part_of_a_step_wraps_within_it():
    source = mixed((3, 40), weights=(1.0, 1.0), homogeneous=(), homogeneous_share=0.0)
    which, number = drawn(source.sampler(1, BATCH), source, range(4))
    assert all(sorted(number[step][which[step] == 0].tolist()) == [0, 0, 1, 1, 2, 2] for step in range(4))


def test_a_pool_without_mixing_is_drawn_as_ever(photographs, shards):
    assert isinstance(open_data(Data(sources=(str(photographs),))).sampler(3, BATCH), Sampler)
    pool = open_data(Data(sources=(str(photographs), str(shards / "part-000.tar"))))
    assert not isinstance(pool, MixedSource)
    order = [2, 1, 9, 6, 0, 8, 7, 5, 3, 4, 11, 10, 8, 5, 0, 9, 4, 2, 11, 1, 3, 10, 6, 7]  # before there were mixtures
    assert [Sampler(12, 3).image(index) for index in range(24)] == order


def test_logged_counts(stream):
    source, which, _ = stream
    values = draw_counts(source, seed=7, batch_size=BATCH)(1500)
    for s, size in enumerate(SIZES):
        count = int((which[:1500] == s).sum())
        assert values[f"drawn/s{s}"] == count
        assert values[f"epochs/s{s}"] == count / size
    assert values["homogeneous_steps"] == (which[:1500] == which[:1500, :1]).all(axis=1).sum()
    pool = FileSource(["a", "b"], [None, None], None)
    assert draw_counts(pool, seed=7, batch_size=BATCH)(3) == {"epochs": 18.0}
    lines = mixture_lines(source, 3000 * BATCH)
    assert lines[0].strip() == "s0: 700 images, 62.5 % of mixed steps, 0 % of steps of its own, 25.7 epochs"
    assert mixture_lines(pool, 10) == []


CROPS = Crops(locals=1, global_size=32, local_size=16)


@pytest.fixture(scope="module")
def real(photographs, shards) -> MixedSource:
    specs = (str(photographs), f"{shards}/part-{{000..002}}.tar")
    return open_data(Data(sources=specs, weights=(3.0, 1.0), homogeneous=(specs[1],), homogeneous_share=0.3))


def batches(source, *, workers: int = 0, start_step: int = 0, steps: int = 6, **plan) -> list[CropBatch]:
    batch = BatchPlan(**{"batch_size": 8, "seed": 5, **plan})
    return list(
        make_loader(
            source, CROPS, Masking(), batch=batch, patch_size=8, start_step=start_step, steps=steps, workers=workers
        )
    )


def equal(one: CropBatch, other: CropBatch) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(CropBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture(scope="module")
def reference(real) -> list[CropBatch]:
    return batches(real)


def test_batches_hold_what_the_sampler_says(real, reference, shards):
    alone = [real.sampler(5, 8).homogeneous_source(step) for step in range(6)]
    assert {None, 1} == set(alone)
    for batch, source in zip(reference, alone):
        from_shards = sum(name.startswith(str(shards)) for name in batch.names)
        assert from_shards == (8 if source == 1 else 2)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_no_bit(real, reference, workers):
    assert all(equal(a, b) for a, b in zip(reference, batches(real, workers=workers), strict=True))


def test_a_start_in_the_middle_is_the_tail(real, reference):
    for start in (1, 4):
        tail = batches(real, start_step=start, workers=1)
        assert all(equal(a, b) for a, b in zip(reference[start:], tail, strict=True))


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (2, 2)])
def test_ranks_and_micro_batches_add_up_to_one_rank(real, reference, world_size, accumulate):
    ranks = [batches(real, rank=r, world_size=world_size, accumulate=accumulate) for r in range(world_size)]
    for step, whole in enumerate(reference):
        parts = [ranks[r][step * accumulate + m] for m in range(accumulate) for r in range(world_size)]
        assert torch.equal(torch.cat([part.global_crops for part in parts], dim=1), whole.global_crops)
        assert sum((part.names for part in parts), ()) == whole.names


def test_an_unreadable_image_is_replaced_from_its_own_source(tmp_path, photographs):
    for number in range(6):
        data = b"junk" if number == 2 else encode(picture(number), "PNG")
        (tmp_path / f"{number}.png").write_bytes(data)
    specs = (str(photographs), str(tmp_path))
    made = batches(open_data(Data(sources=specs, homogeneous=(specs[1],), homogeneous_share=1.0)), steps=2)
    for batch in made:
        assert all(name.startswith(str(tmp_path)) for name in batch.names)
    assert {entry.split(":")[0] for batch in made for entry in batch.skipped} == {str(tmp_path / "2.png")}
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "bad.png").write_bytes(b"junk")
    broken = Data(sources=(specs[0], str(tmp_path / "only")), weights=(0, 1))
    with pytest.raises(ValueError, match="1 images in a row are unreadable"):
        batches(open_data(broken), steps=1)


def test_short_names():
    assert short_names(["/x/a.tar", "y/photos/", "m.parquet:part=raw", "l.txt"]) == ("a", "photos", "m:raw", "l")
    assert short_names(["/x/a/b.tar", "/x/c/b.tar", "d"]) == ("a/b", "c/b", "d")
    assert short_names(["a.tar", "a.tar"]) == ("a#1", "a#2")
    assert short_names(["torchvision:CIFAR10:root=/x/y:train=true"]) == ("CIFAR10:train=true",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (1.0,)}, "data.weights: expected one number for each of the 2 sources, got 1"),
        ({"weights": (1.0, -1.0)}, r"finite numbers of at least 0, not all 0, got \[1.0, -1.0\]"),
        ({"weights": (0.0, 0.0)}, "not all 0"),
        ({"weights": (1.0, math.inf)}, "finite numbers"),
        ({"weights": (1.0, math.nan)}, "finite numbers"),
        ({"homogeneous": ("a",), "homogeneous_share": 1.5}, r"share of the steps in \[0, 1\], got 1.5"),
        ({"homogeneous": ("a",)}, "together with a data.homogeneous_share above 0"),
        ({"homogeneous_share": 0.1}, r"got \[\] and 0.1"),
        ({"homogeneous": ("bb",), "homogeneous_share": 0.1}, "bb is none of data.sources; nearest: b"),
        ({"homogeneous": ("b", "y/b.tar"), "homogeneous_share": 0.1}, "expected each source once"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        open_data(Data(sources=("x/a.tar", "y/b.tar"), **settings))
    assert "\n" not in str(raised.value)


def test_a_name_that_two_sources_have():
    with pytest.raises(ValueError, match="a.tar is there more than once"):
        open_data(Data(sources=("a.tar", "a.tar"), homogeneous=("a.tar",), homogeneous_share=0.1))


def test_the_joined_source_is_all_of_them(real, photographs, shards):
    assert len(real) == 36
    assert real.sizes == (24, 12)
    assert real.name(24) == open_source(f"{shards}/part-000.tar").name(0)
