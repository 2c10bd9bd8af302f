"""The commands around a run: what they print and write is what the Python functions below them give."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dinov3_train
from dinov3_train import recipes
from dinov3_train.build import load, view
from dinov3_train.config import override
from dinov3_train.data.sources import open_source
from dinov3_train.evaluation.extract import extract
from dinov3_train.evaluation.knn import evaluate_knn


@pytest.fixture(scope="module")
def run(recipe_file, image_folder, tmp_path_factory):
    """A run through the Python API, evaluated while it trained."""
    out = tmp_path_factory.mktemp("api") / "run"
    labelled = f"data.labelled=['{image_folder}', '{image_folder}']"
    words = [f"data.sources=['{image_folder}']", labelled, "run.evaluate_every=6", "run.history_every=4"]
    config = override(recipes.recipe(str(recipe_file)), words)
    finished = dinov3_train.pretrain(config, out)
    assert (finished.out, finished.step, finished.reason) == (out, 12, "steps")
    return config, out


def test_metrics_hold_losses_schedules_speed_and_scores(run):
    lines = [json.loads(line) for line in (run[1] / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "knn" in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in scores] == [6, 12]
    for line in losses:
        total = 2 / 6 * line["dino_global"] + 4 / 6 * line["dino_local"] + line["ibot"] + 0.1 * line["koleo"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)
        assert line["images"] == 8 * line["step"]
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
    assert all(0 <= line["knn_mean_per_class"] <= 1 for line in scores)


def test_history_keeps_teacher_backbones(run):
    kept = sorted(path.name for path in (run[1] / "history").iterdir())
    assert kept == [f"step_{step:08d}.safetensors" for step in (4, 8, 12)]
    final, newest = load_file(run[1] / "history" / kept[-1]), load(run[1]).state_dict()
    assert all(torch.equal(final[name], newest[name]) for name in newest)


def test_knn_prints_and_writes_what_python_gives(dinov3, run, image_folder, tmp_path):
    config, out = run
    words = (f"backbone={out}", f"train={image_folder}", f"test={image_folder}", "k=3,5", f"out={tmp_path}/knn.json")
    status, text, error = dinov3("evaluate", "knn", *words)
    assert status == 0, error
    found = extract(load(out), open_source(str(image_folder)), view(config))
    wanted = evaluate_knn(found, found, k=(3, 5))
    for score in wanted.scores:
        assert f"k={score.k}: accuracy {score.accuracy:.4f}, mean per class {score.mean_per_class:.4f}" in text
    written = json.loads((tmp_path / "knn.json").read_text())
    assert [score["accuracy"] for score in written["scores"]] == [score.accuracy for score in wanted.scores]


def test_step_0_is_the_untrained_start(dinov3, run, image_folder):
    _, text, _ = dinov3(
        "evaluate", "knn", f"backbone={run[1]}", "step=0", f"train={image_folder}", f"test={image_folder}"
    )
    assert "mean per class" in text
    untrained, trained = load(run[1], step=0), load(run[1])
    assert not torch.equal(untrained.cls_token, trained.cls_token)
    assert torch.equal(untrained.cls_token, load(run[1], step=0).cls_token)


def test_features_of_one_checkpoint(dinov3, run, image_folder, tmp_path):
    config, out = run
    path, checkpoint = tmp_path / "features.safetensors", out / "checkpoints" / "step_00000010"
    status, text, error = dinov3(
        "features", f"backbone={checkpoint}", f"data={image_folder}", f"out={path}", "pooling=cls+patch"
    )
    assert status == 0, error
    assert "40 x 64" in text
    wanted = extract(load(out, step=10), open_source(str(image_folder)), view(config), pooling="cls+patch")
    assert torch.equal(load_file(path)["features"], wanted.features)


@pytest.mark.parametrize("kind", ["pca", "cosine"])
def test_pictures(dinov3, run, image_folder, tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    status, _, error = dinov3(
        "visualize", kind, f"backbone={run[1]}", f"data={image_folder}", f"out={path}", "images=2"
    )
    assert status == 0, error
    pixels = np.asarray(Image.open(path))
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # a picture, not an empty sheet


def test_print_config_is_a_patch_that_gives_the_same_config(dinov3, recipe_file, image_folder, tmp_path):
    words = (f"recipe={recipe_file}", f"data={image_folder}", "optimizer.lr=0.25")
    _, text, _ = dinov3("pretrain", *words, "--print-config")
    (tmp_path / "patch.yaml").write_text(text)
    _, again, _ = dinov3("pretrain", f"recipe={recipe_file}", f"config={tmp_path / 'patch.yaml'}", "--print-config")
    assert again == text
    assert "lr: 0.25" in text


@pytest.mark.parametrize("name", recipes.names())
def test_plan_of_every_recipe(dinov3, name):
    status, text, error = dinov3("plan", f"recipe={name}")
    assert status == 0, error
    assert "memory: total" in text
    assert "FLOPs: total" in text


def test_plan_refuses_ranks_that_do_not_divide(dinov3):
    assert dinov3("plan", "recipe=vit_small", "ranks=3")[0] == 2


def test_recipes_are_listed(dinov3):
    text = dinov3("recipes")[1]
    assert all(name in text for name in recipes.names())


def test_doctor_names_the_path_of_every_op(dinov3):
    text = dinov3("doctor")[1]
    for op in ("rope_attention", "rope_rotate", "gram_loss", "sinkhorn_knopp", "assignment_cross_entropy"):
        assert f"op {op}" in text


def test_threads_wait_patiently_unless_the_user_says_how(dinov3, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    dinov3("recipes")
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    dinov3("recipes")
    assert os.environ["GOMP_SPINCOUNT"] == "3000"
    code = "import sys, dinov3_train.cli; assert 'torch' not in sys.modules"  # OpenMP reads it when torch is loaded
    subprocess.run([sys.executable, "-c", code], check=True)
