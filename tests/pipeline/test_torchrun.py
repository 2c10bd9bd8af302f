"""Two gloo ranks through the command line: the run one rank would have made, and checkpoints that either continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dinov3_train.build import load


@pytest.fixture(scope="module")
def runs(recipe_file, image_folder, tmp_path_factory):
    """The same eight steps by one rank, by two, and by two that continue one rank's first four."""
    root = tmp_path_factory.mktemp("ranks")
    words = [f"recipe={recipe_file}", f"data={image_folder}", "run.precision=fp32", "optimizer.clip=null"]
    _dinov3(1, *words, f"out={root / 'one'}", "run.steps=8")
    _dinov3(2, *words, f"out={root / 'two'}", "run.steps=8")
    _dinov3(1, *words, f"out={root / 'mixed'}", "run.steps=4")
    text = _dinov3(2, *words, f"out={root / 'mixed'}", "run.steps=8")
    assert "continuing at step 4" in text
    return root


def _dinov3(ranks: int, *words: str) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "-m", "dinov3_train.cli", "pretrain", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("other", ["two", "mixed"])
def test_ranks_do_not_change_the_run(runs, other):
    one, many = load(runs / "one").state_dict(), load(runs / other).state_dict()
    for name, weight in one.items():
        # sums over ranks come in another order, and AdamW divides by the root of a running square, so the difference
        # of a rounding in a gradient near 0 can reach a share of a step: 8 steps of at most 1e-3, EMA momentum 0.994
        torch.testing.assert_close(many[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_only_the_first_rank_writes(runs):
    lines = [json.loads(line) for line in (runs / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss" in line]) == 4  # every second step once
    assert [line["step"] for line in lines if "health/locality" in line] == [0, 8]


@pytest.mark.slow
def test_two_ranks_from_existing_weights_measured_while_they_train(recipe_file, image_folder, tmp_path):
    """Imported weights, drift and k-NN on the first rank: the other waits, and the run is that of one rank."""
    words = [f"recipe={recipe_file}", f"data={image_folder}", "run.precision=fp32", "optimizer.clip=null"]
    _dinov3(1, *words, f"out={tmp_path / 'start'}", "run.steps=2")
    words += [f"init={tmp_path / 'start'}", "run.steps=6", "run.drift_every=2", "run.evaluate_every=3"]
    words += [f"data.labelled=['{image_folder}','{image_folder}']", "optimizer.freeze_backbone=2"]
    texts = [_dinov3(ranks, *words, f"out={tmp_path / str(ranks)}") for ranks in (1, 2)]
    assert all(text.count("cosine with the starting weights") == 3 for text in texts)
    one, two = load(tmp_path / "1").state_dict(), load(tmp_path / "2").state_dict()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)  # as test_ranks_do_not_change_the_run
