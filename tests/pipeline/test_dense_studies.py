"""`dinov3 study gram-teacher|dense-regularizers`: studies of seconds, resumed, and one line for what cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3_train.build import run_config
from dinov3_train.studies.anchoring import Asked, continued, pretraining


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """10 images whose left or right half is bright, with masks of two classes."""
    folder = tmp_path_factory.mktemp("masked")
    for number in range(10):
        mask = np.zeros((40, 40), np.uint8)
        mask[:, 20 * (number % 2) : 20 + 20 * (number % 2)] = 1
        noise = np.random.default_rng(number).integers(0, 100, (40, 40, 3))
        Image.fromarray((noise + 150 * mask[..., None]).astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}.mask.png")
    return folder


@pytest.fixture
def study(dinov3, recipe_file, image_folder, masked, tmp_path):
    def run(name: str, *words: str, out: str = "study") -> tuple[int, str, str]:
        common = [f"data={image_folder}", f"train={masked}", f"test={masked}", f"recipe={recipe_file}"]
        sizes = ["steps=6", "more=2", "probe_steps=5", "size=32", "run.batch_size=4"]
        return dinov3("study", name, f"out={tmp_path / out}", *common, *sizes, *words)

    return run


def test_gram_teacher(study, tmp_path):
    status, text, error = study("gram-teacher", "teachers=2,6", "resolutions=1,2", "weights=1.5")
    assert status == 0, error
    arms = ["none", "start", *(f"step{step}-x{factor}-w1.5" for step in (2, 6) for factor in (1, 2))]
    for arm in arms:
        assert f"| {arm} | 1 |" in text
    scores = json.loads((tmp_path / "study" / "scores" / "step2-x2-w1.5-seed0.json").read_text())
    assert scores.keys() == {"mIoU", "locality", "coherence", "signs"}
    assert 0 <= scores["mIoU"]["value"] <= 1
    assert len(scores["locality"]["items"]) == 10
    configs = [run_config(tmp_path / "study" / "runs" / f"{arm}-seed0") for arm in arms]
    assert configs[0].gram.weight == 0
    assert configs[3].gram.teacher.endswith("step_00000002.safetensors")
    assert (configs[3].crops.gram_size, configs[2].crops.gram_size) == (64, 32)
    beginnings = {config.start.run for config in configs} - {None}
    assert len(beginnings) == 1  # all go on from one pretraining
    assert Path(beginnings.pop()).parent.parent == (tmp_path / "study" / "runs" / "start-seed0").resolve()
    status, again, error = study("gram-teacher", "teachers=2,6", "resolutions=1,2", "weights=1.5")
    assert status == 0, error
    assert "from scratch" not in again  # nothing is trained twice
    assert (tmp_path / "study" / "plot.png").is_file()


def test_the_weights_a_pretraining_began_with_are_a_teacher(study, tmp_path):
    assert study("gram-teacher", "teachers=6", "resolutions=1", out="first")[0] == 0
    start = f"init.weights={tmp_path / 'first' / 'pretraining' / 'seed0'}"
    status, text, error = study("gram-teacher", start, "teachers=0", "resolutions=1", out="second")
    assert status == 0, error
    assert "| step0-x1-w2 | 1 |" in text
    config = run_config(tmp_path / "second" / "runs" / "step0-x1-w2-seed0")
    assert config.gram.teacher.endswith("step_00000000.safetensors")
    status, _, error = study("dense-regularizers", start, "teacher=7", out="third")
    assert (status, "a step in [0, 6], got 7" in error) == (2, True)


def test_dense_regularizers(study, tmp_path):
    status, text, error = study("dense-regularizers")
    assert status == 0, error
    arms = ("none", "start", "gram", "koleo-patches", "ibot", "dense-head", "features")
    losses = {}
    for arm in arms:
        assert f"| {arm} | 1 |" in text
        rows = (tmp_path / "study" / "runs" / f"{arm}-seed0" / "metrics.jsonl").read_text().splitlines()
        losses[arm] = next(row for row in map(json.loads, rows) if "loss" in row)
    own = {"gram": "gram", "koleo-patches": "koleo_patches", "dense-head": "dense", "features": "gram_features"}
    for arm, key in own.items():
        assert [other for other in arms if key in losses[other]] == [arm]
    configs = {arm: run_config(tmp_path / "study" / "runs" / f"{arm}-seed0") for arm in arms}
    assert configs["ibot"].losses.ibot == 2 * configs["none"].losses.ibot
    starts = {arm: config.start.run for arm, config in configs.items()}
    assert starts["dense-head"] != starts["none"] == starts["features"]
    assert "gradient_norm/dense_head" in losses["dense-head"]


def test_arms_differ_from_no_arm_in_what_they_are_about(recipe_file, image_folder, tmp_path):
    asked = Asked(data=str(image_folder), train="", test="", recipe=str(recipe_file), steps=6, more=3)
    base = pretraining(asked, history_every=2)
    plain = continued(base, tmp_path, 3, {})
    other = continued(base, tmp_path, 3, {"losses.koleo_patches": 0.1})
    assert plain.losses.koleo_patches == 0
    assert plain.run == other.run
    assert plain.optimizer == other.optimizer
    assert plain.gram.weight == 0
    assert plain.crops.gram_size is None
    assert plain.run.steps == 3
    assert plain.optimizer.momentum == 0.0
    assert continued(base, tmp_path, 200, {}).optimizer.momentum == min(
        0.975, continued(base, tmp_path, 10**6, {}).optimizer.momentum
    )


def test_mistakes_are_one_line(study, tmp_path):
    cases = [
        ("gram-teacher", ("teachers=7",), "different steps in [1, 6], got (7,)"),
        ("gram-teacher", ("teachers=2,2",), "different steps"),
        ("gram-teacher", ("resolutions=0.5",), "resolutions of at least 1"),
        ("gram-teacher", ("resolutions=1.1",), "whole patches of 8 px"),
        ("gram-teacher", ("weights=0",), "weights above 0"),
        ("gram-teacher", ("more=0",), "more expects at least 1"),
        ("dense-regularizers", ("teacher=9",), "a step in [1, 6], got 9"),
        ("dense-regularizers", ("ibot=0",), "ibot expects a weight above 0"),
        ("dense-regularizers", (f"train={tmp_path / 'gone'}",), "does not exist"),
        ("dense-regularizer", (), "nearest: dense-regularizers"),
    ]
    for name, words, message in cases:
        status, _, error = study(name, *words, out="other")
        assert status == 2, (name, words, error)
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()
