"""Mixed resolutions: one plan per step, one loader for all of them."""

import multiprocessing
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dinov3_train.config import Crops, Masking
from dinov3_train.data.loader import make_loader
from dinov3_train.data.resolutions import resolution, resolutions
from dinov3_train.data.sampler import BatchPlan
from dinov3_train.data.sources import open_source

MIX = ((32, 16, 48, 0.5), (48, 16, 64, 0.3), (48, 24, 0, 0.2))
CROPS = Crops(locals=2, global_size=48, local_size=24, mix=MIX)


def test_the_plan_is_a_function_of_seed_and_step_with_the_given_shares():
    drawn = [resolution(CROPS, seed=3, step=step) for step in range(2000)]
    assert drawn == [resolution(CROPS, seed=3, step=step) for step in range(2000)]
    assert drawn != [resolution(CROPS, seed=4, step=step) for step in range(2000)]
    counts = Counter(drawn)
    for number, (_, _, _, share) in enumerate(MIX):
        assert counts[number] / 2000 == pytest.approx(share, abs=0.04)  # 3.6 standard deviations


def test_without_a_mix_nothing_is_drawn():
    crops = replace(CROPS, mix=())
    assert resolutions(crops) == [(1.0, crops)]
    assert {resolution(crops, seed=0, step=step) for step in range(50)} == {0}


def test_entries_become_crops():
    (_, first), _, (_, last) = resolutions(CROPS)
    assert (first.global_size, first.local_size, first.gram_size, first.mix) == (32, 16, 48, ())
    assert last.gram_size is None


@pytest.fixture(name="loaded")
def loaded_fixture(photographs):
    def load(workers: int = 0, start: int = 0, rank: int = 0, world_size: int = 1):
        plan = BatchPlan(batch_size=4, seed=2, rank=rank, world_size=world_size, accumulate=2)
        return make_loader(
            open_source(str(photographs)),
            CROPS,
            Masking(),
            batch=plan,
            patch_size=8,
            start_step=start,
            steps=8,
            workers=workers,
        )

    return load


def sides(batch) -> tuple[int, int, int]:
    return (
        batch.global_crops.shape[-1],
        batch.local_crops.shape[-1],
        0 if batch.gram_crops is None else batch.gram_crops.shape[-1],
    )


def test_both_micro_batches_of_a_step_have_the_planned_sides(loaded):
    for number, batch in enumerate(loaded()):
        planned = MIX[resolution(CROPS, seed=2, step=number // 2)]
        assert sides(batch) == planned[:3]
        assert batch.masks.shape[-1] == (planned[0] // 8) ** 2
    assert number == 15


def test_all_ranks_have_the_same_sides_and_a_resume_continues_the_plan(loaded):
    whole = [sides(batch) for batch in loaded()]
    assert len(set(whole)) == 3
    assert [sides(batch) for batch in loaded(rank=1, world_size=2)] == whole
    assert [sides(batch) for batch in loaded(start=3)] == whole[6:]


def test_one_pool_of_workers_serves_all_resolutions(loaded):
    """Two workers are two processes, and make the bits that none makes."""
    batches = iter(loaded(workers=2))
    for number, theirs in enumerate(loaded()):
        mine = next(batches)
        assert number or len(multiprocessing.active_children()) == 2
        assert torch.equal(mine.global_crops, theirs.global_crops)
        assert torch.equal(mine.masks, theirs.masks)


def test_sides_that_do_not_divide(photographs):
    crops = replace(CROPS, mix=((32, 16, 48, 0.5), (48, 20, 64, 0.5)))
    with pytest.raises(ValueError, match="local_size: expected a multiple of the patch size 8"):
        make_loader(
            open_source(str(photographs)),
            crops,
            Masking(),
            batch=BatchPlan(batch_size=2),
            patch_size=8,
            start_step=0,
            steps=1,
            workers=0,
        )
