"""The monitor in training: its lines are what the functions give, survive a kill, and name what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from dinov3_train import recipes
from dinov3_train.build import monitor, new_state, pretrain, view
from dinov3_train.config import override
from dinov3_train.data.sources import open_source
from dinov3_train.evaluation.monitor import history_of
from dinov3_train.evaluation.panel import measures, open_panel, panel_features
from dinov3_train.train.distributed import ranks
from dinov3_train.train.run_folder import RunFolder
from dinov3_train.weights import resolve


def looks(run) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history_of(rows)]


@pytest.fixture
def config(recipe_file, image_folder):
    words = [f"data.sources=['{image_folder}']", "monitor.every=4", "monitor.images=6", "run.checkpoint_every=5"]
    return override(recipes.recipe(str(recipe_file)), words)


def test_the_lines_are_what_the_functions_give(config, image_folder, tmp_path):
    pretrain(config, tmp_path / "run")
    rows = looks(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    panel = open_panel(open_source(str(image_folder)), view(config), images=6, patch_size=8)
    found = resolve(str(tmp_path / "run"), step=12)
    features = panel_features(found.backbone, panel)
    start = panel_features(resolve(str(tmp_path / "run"), step=0).backbone, panel).patches
    expected = measures(features, heads=found.heads, start=start)
    assert {key: rows[-1][key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert rows[-1]["gram_previous"] > 0
    assert {"gram_start", "gram_previous", "drift"} & rows[0].keys() == set()


def test_a_run_that_was_stopped_looks_the_same(config, tmp_path):
    pretrain(config, tmp_path / "whole")
    part = override(config, ["run.steps=6"])
    pretrain(part, tmp_path / "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # what a kill after the checkpoint would leave
        file.write('{"step": 8, "health/locality": 9.0}\n')
    pretrain(config, tmp_path / "parts")
    whole, parts = looks(tmp_path / "whole"), [row for row in looks(tmp_path / "parts") if row["step"] != 6]
    assert [row["step"] for row in parts] == [0, 4, 8, 12]
    for row in (*whole, *parts):
        row.pop("gram_previous", None)  # the look at 6, the first part's last step, comes between 4 and 8
    assert whole == parts


def test_monitoring_changes_no_weight(config, tmp_path):
    pretrain(config, tmp_path / "seen")
    pretrain(override(config, ["monitor.every=0"]), tmp_path / "unseen")
    assert not looks(tmp_path / "unseen")
    assert not (tmp_path / "unseen" / "health").exists()
    one, other = (resolve(str(tmp_path / name)).backbone.state_dict() for name in ("seen", "unseen"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_kept_features_are_few(config, tmp_path):
    pretrain(override(config, ["run.steps=20", "monitor.every=1", "run.keep=1"]), tmp_path / "run")
    kept = sorted(int(path.stem[5:]) for path in (tmp_path / "run" / "health").glob("*.safetensors"))
    assert kept[0] == 0
    assert kept[-1] == 20
    assert len(kept) <= 8


def test_a_collapsed_teacher_is_named(config, tmp_path):
    """The real objects of a run, its teacher spoiled by hand after a healthy look."""
    config = override(config, ["backbone.layer_scale=1.0", "backbone.init_std=0.2", "ibot_head.prototype_std=0.5"])
    config = override(config, ["dino_head.init_std=0.2", "dino_head.prototype_std=0.5"])
    source = open_source(list(config.data.sources))
    with ranks() as here:
        state = new_state(config, here)
        look = monitor(config, source, RunFolder(tmp_path / "run"), 0, Console(quiet=True))
        state.step = 8
        before = " | ".join(look(state)[1])  # these images are noise from patch to patch, and so is their similarity
        assert "collapse" not in before
        assert "alike" not in before
        with torch.no_grad():
            state.teacher.backbone.norm.weight.mul_(1e-3)
            state.teacher.backbone.norm.bias.fill_(1.0)
        state.step = 12
        text = " | ".join(look(state)[1])
    assert "collapse: every image gets the same CLS token" in text
    assert "the patches of an image are all alike" in text
    assert "collapse of the dino prototypes" in text


def test_a_small_source_is_said_and_a_bad_one_refused(config, image_folder, tmp_path):
    folder = RunFolder(tmp_path / "run")
    console = Console(record=True, width=200)
    source = open_source(str(image_folder))
    assert monitor(override(config, ["monitor.images=64"]), source, folder, 0, console) is not None
    assert "looks at 40 images, there are no more" in console.export_text()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes((image_folder / "blobs" / "001.png").read_bytes())
    assert monitor(config, open_source(str(tmp_path / "one")), folder, 0, console) is None
    assert "no health monitor: panel: expected at least 2 images, the source has 1" in console.export_text()
    with pytest.raises(ValueError, match=r"monitor.source: panel: expected at least 2 images, the source has 1"):
        monitor(override(config, [f"monitor.source={tmp_path / 'one'}"]), source, folder, 0, console)


def test_another_panel_is_not_compared_with(config, tmp_path):
    pretrain(override(config, ["run.steps=5"]), tmp_path / "run")
    pretrain(override(config, ["monitor.images=4"]), tmp_path / "run")
    later = [row for row in looks(tmp_path / "run") if row["step"] > 5]
    assert "drift" not in later[0]
    assert "gram_previous" not in later[0]
    assert "gram_previous" in later[1]
