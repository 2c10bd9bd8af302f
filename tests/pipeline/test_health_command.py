"""`dinov3 health`: one checkpoint, a whole run with its thin history, and one clear line for what cannot work."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from dinov3_train import recipes
from dinov3_train.build import pretrain
from dinov3_train.config import override


@pytest.fixture(scope="module")
def run(recipe_file, image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("health") / "run"
    words = [f"data.sources=['{image_folder}']", "run.history_every=4", "monitor.images=6", "monitor.every=6"]
    pretrain(override(recipes.recipe(str(recipe_file)), words), out)
    return out


def test_one_checkpoint(dinov3, run, image_folder, tmp_path):
    out = tmp_path / "deep" / "health.json"
    status, text, error = dinov3("health", f"backbone={run}", f"data={image_folder}", "images=6", f"out={out}")
    assert status == 0, error
    assert "locality of patch similarity" in text
    assert "6 images at 32 px" in text
    result = json.loads(out.read_text())
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if "health/locality" in line][-1]
    assert result["looks"][0]["locality"] == pytest.approx(last["health/locality"], rel=1e-4)
    assert result["looks"][0]["dino_information"] == pytest.approx(last["health/dino_information"], rel=1e-3, abs=1e-6)
    assert len(result["panel"]["names"]) == 6
    assert dinov3("health", f"backbone={run}", "images=6", "step=0")[1].count("warning") == 0  # untrained: not judged


def test_the_history_of_a_run(dinov3, run, tmp_path):
    out = tmp_path / "health.json"
    status, text, error = dinov3("health", f"backbone={run}", "history=true", "images=6", f"out={out}")
    assert status == 0, error
    result = json.loads(out.read_text())
    assert [look["step"] for look in result["looks"]] == [0, 4, 5, 8, 10, 12]
    assert "dino_use" in result["looks"][2]
    assert "dino_use" not in result["looks"][1]  # the thin history has no heads
    distances = result["gram_distances"]
    assert all(distances[n][n] < 1e-9 for n in range(6))
    assert distances[0][5] == pytest.approx(distances[5][0], rel=1e-4)
    assert distances[0][5] == pytest.approx(result["looks"][5]["gram_start"], rel=1e-4)
    assert distances[0][5] > distances[4][5] > 0
    warnings = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(result["signs"])


def test_mistakes_are_one_line(dinov3, run, tmp_path):
    cases = [
        (("images=1",), "images expects at least 2, got 1"),
        (("images=41",), "expected at least 41 images, the source has 40"),
        (("out=x.csv",), "health: out expects a .json file, got 'x.csv'"),
        (("history=yes",), "history expects true"),
        (("history=true", "step=5"), "step= cannot be given with it"),
        (("size=30",), "multiple of the patch size 8"),
        (("step=7",), "no checkpoint of step 7"),
        ((f"data={tmp_path}",), str(tmp_path)),
    ]
    for words, message in cases:
        status, _, error = dinov3("health", f"backbone={run}", *words)
        assert status == 2, error
        assert message in error
        assert error.count("\n") == 1


def test_a_run_without_checkpoints_and_an_unreadable_panel(dinov3, run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare / "config.yaml")
    status, _, error = dinov3("health", f"backbone={bare}", "history=true")
    assert status == 2
    assert "has no checkpoint and no history yet" in error
    status, _, error = dinov3("health", f"backbone={bare}")
    assert status == 2
    assert "the run has no checkpoint yet" in error
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(images / f"{number}.png")
    (images / "3.png").write_bytes(b"broken")
    status, _, error = dinov3("health", f"backbone={run}", f"data={images}", "images=4")
    assert status == 2
    assert "expected 4 readable images, got 3 of the 4" in error
