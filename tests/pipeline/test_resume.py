"""A run that is killed at any moment and continued ends with the very weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch

from dinov3_train.build import load, run_config

STEPS = 60


@pytest.fixture(scope="module")
def uninterrupted(start_dinov3, recipe_file, image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start_dinov3(*_words(recipe_file, image_folder, out))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


def _words(recipe_file, image_folder, out, *more):
    return ("pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", f"run.steps={STEPS}", *more)


def _same_weights(one, other) -> bool:
    first, second = load(one).state_dict(), load(other).state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _steps(out) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(uninterrupted, start_dinov3, recipe_file, image_folder, tmp_path, kills):
    out, generator, process = tmp_path / "run", random.Random(kills), None
    words = _words(recipe_file, image_folder, out)
    for _ in range(kills):
        process = start_dinov3(*words)
        # once training has begun, so that the moments spread over steps, checkpoint writes and renames
        _wait_for(lambda: (out / "config.yaml").exists() and process.poll() is None, process)
        time.sleep(generator.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    process = start_dinov3(*words)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert _same_weights(uninterrupted, out)
    assert _steps(out) == _steps(uninterrupted)  # no line twice, none lost


def _wait_for(condition, process, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "training did not begin"
        if process.poll() is not None:
            return  # it finished before the kill; the next start finds a finished run
        time.sleep(0.02)


def test_sigterm_saves_and_the_same_command_continues(uninterrupted, start_dinov3, recipe_file, image_folder, tmp_path):
    out = tmp_path / "run"
    words = _words(recipe_file, image_folder, out, "run.checkpoint_every=1000")
    process = start_dinov3(*words)
    _wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 143, text
    assert "the checkpoint is written" in text
    assert list((out / "checkpoints").glob("step_*"))
    process = start_dinov3(*words)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "continuing at step" in text
    assert _same_weights(uninterrupted, out)


@pytest.mark.parametrize("workers", [1, 4])
def test_loader_workers_do_not_change_the_weights(
    uninterrupted, start_dinov3, recipe_file, image_folder, tmp_path, workers
):
    out = tmp_path / "run"
    process = start_dinov3(*_words(recipe_file, image_folder, out, f"data.workers={workers}"))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert _same_weights(uninterrupted, out)


def test_unfinished_checkpoint_does_not_count(uninterrupted, dinov3, recipe_file, image_folder, tmp_path):
    out = tmp_path / "run"
    assert dinov3(*_words(recipe_file, image_folder, out, "run.steps=10"))[0] == 0
    os.rename(out / "checkpoints" / "step_00000010", out / "checkpoints" / "step_00000010.partial")
    status, text, error = dinov3(*_words(recipe_file, image_folder, out))
    assert status == 0, error
    assert "continuing at step 5" in text
    assert _same_weights(uninterrupted, out)


def test_effective_config_is_in_the_folder_and_in_each_checkpoint(uninterrupted):
    config = run_config(uninterrupted)
    assert config.run.steps == STEPS
    from dinov3_train.config import from_yaml
    from dinov3_train.train.checkpoint import checkpoint_config

    assert from_yaml(checkpoint_config(uninterrupted / "checkpoints" / f"step_{STEPS:08d}")) == config
