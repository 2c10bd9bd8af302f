"""Runs that start from weights: frozen, ramped, resumed without a second look at them, and told how far they moved."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import dinov3_train
from dinov3_train import distillation, recipes
from dinov3_train.build import load, networks, run_config
from dinov3_train.config import override
from dinov3_train.models import key_maps
from dinov3_train.models.vit import BACKBONES, VisionTransformer
from dinov3_train.weights import licences, resolve
from dinov3_train.weights.export import export

FRESH = ("optimizer.freeze_backbone=4", "optimizer.backbone_ramp=2", "run.drift_every=4", "run.drift_images=6")


@pytest.fixture(scope="module")
def source(recipe_file, image_folder, tmp_path_factory):
    """A finished run, and its weights as a file without heads that goes by the name of a released one."""
    root = tmp_path_factory.mktemp("source")
    config = override(recipes.recipe(str(recipe_file)), [f"data.sources=['{image_folder}']", "run.steps=8"])
    dinov3_train.pretrain(config, root / "run")
    export(resolve(root / "run"), "safetensors", root / "dinov3_lvd1689m.safetensors")
    return root


@pytest.fixture
def pretrain(dinov3, recipe_file, image_folder):
    def run(out, *words, status=0):
        got, text, error = dinov3("pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", *words)
        assert got == status, text + error
        assert not error or error.count("\n") == 1
        return error if status else text

    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_fresh_heads_learn_while_the_backbone_is_as_it_was(pretrain, source, tmp_path):
    weights = source / "dinov3_lvd1689m.safetensors"
    text = pretrain(tmp_path / "run", f"init={weights}", *FRESH, "run.steps=4", "run.checkpoint_every=4")
    assert "with fresh heads" in text
    assert "frozen for 4 steps" in text
    found = resolve(tmp_path / "run")
    assert same(found.backbone.state_dict(), load(source / "run").state_dict())
    untrained = run_heads(tmp_path / "run")
    assert not torch.equal(found.heads["dino_head"].mlp[0].weight, untrained)
    pretrain(tmp_path / "run", f"init={weights}", *FRESH, "run.steps=6", "run.checkpoint_every=4")
    assert not same(load(tmp_path / "run").state_dict(), load(source / "run").state_dict())


def run_heads(run):
    """The heads a run's seed gives."""
    return networks(run_config(run)).dino_head.mlp[0].weight


def test_a_run_gives_its_heads_too(pretrain, source, tmp_path):
    text = pretrain(tmp_path / "run", f"init={source / 'run'}", "run.steps=1", "optimizer.lr=0.0")
    assert "with their heads" in text
    before, after = resolve(source / "run"), resolve(tmp_path / "run")
    for name in ("dino_head", "ibot_head"):
        assert same(before.heads[name].state_dict(), after.heads[name].state_dict())
    text = pretrain(tmp_path / "fresh", f"init={source / 'run'}", "run.steps=1", "init.heads=false")
    assert "with fresh heads" in text


@pytest.mark.parametrize("architecture", ["recipe", "weights"])
def test_resume_is_bit_identical_and_needs_the_weights_no_more(pretrain, source, tmp_path, architecture):
    weights = tmp_path / "weights.safetensors"
    shutil.copy(source / "dinov3_lvd1689m.safetensors", weights)
    words = (f"init={weights}", *FRESH, "run.checkpoint_every=5", f"init.architecture={architecture}")
    pretrain(tmp_path / "whole", *words)
    pretrain(tmp_path / "parts", *words, "run.steps=5")
    weights.unlink()
    text = pretrain(tmp_path / "parts", *words)
    assert "continuing at step 5" in text
    assert same(load(tmp_path / "whole").state_dict(), load(tmp_path / "parts").state_dict())
    assert moves(tmp_path / "whole") == moves(tmp_path / "parts")
    error = pretrain(tmp_path / "parts", "run.steps=14", status=2)  # another run: without init
    assert "init.weights" in error


def moves(run):
    """Drift as logged: (step, CLS cosine, patch cosine)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["drift_cls_cosine"], line["drift_patch_cosine"])
        for line in lines
        if "drift_cls_cosine" in line
    ]


def test_drift_is_one_while_frozen_and_told_in_words_when_large(pretrain, source, tmp_path):
    weights = source / "dinov3_lvd1689m.safetensors"
    text = pretrain(tmp_path / "run", f"init={weights}", *FRESH, "optimizer.lr=0.3", "optimizer.momentum=0.0")
    (first, *frozen), *_, (last, *moved) = moves(tmp_path / "run")
    assert (first, last) == (4, 12)
    assert frozen == pytest.approx([1.0, 1.0], abs=1e-6)
    assert max(moved) < 0.7
    assert "still close to where they began" in text
    assert "warning: the features have moved far" in text
    start = load_file(tmp_path / "run" / "history" / "step_00000000.safetensors")
    assert same(start, load(source / "run").state_dict())
    assert same(resolve(tmp_path / "run", step=0).backbone.state_dict(), start)


def test_the_licence_is_said_kept_and_exported(pretrain, source, small_official, tmp_path):
    text = pretrain(
        tmp_path / "run", f"init={small_official}", "init.architecture=weights", "run.steps=2", "crops.local_size=24"
    )
    assert f"licence of these weights: {licences.DINOV3}" in text
    config = run_config(tmp_path / "run")
    assert (config.init.licence, config.init.origin) == (licences.DINOV3, str(small_official))
    assert config.backbone.embed_dim == 64
    assert resolve(tmp_path / "run" / "checkpoints" / "step_00000002").licence == licences.DINOV3
    export(resolve(tmp_path / "run"), "safetensors", tmp_path / "out.safetensors")
    assert resolve(tmp_path / "out.safetensors").licence == licences.DINOV3
    assert resolve(source / "run").licence == licences.OWN


@pytest.fixture
def small_official(tmp_path):
    """A file as released, of one small block."""
    shape = replace(BACKBONES["vit_small"], embed_dim=64, depth=1, heads=1, patch_size=8)
    path = tmp_path / "dinov3_vits16_pretrain_lvd1689m-00000000.pth"
    torch.save(key_maps.to_official(VisionTransformer(shape).state_dict(), heads=1), path)
    return path


def test_another_architecture_lists_the_keys_and_the_ways_out(pretrain, small_official, tmp_path):
    error = pretrain(tmp_path / "run", f"init={small_official}", status=2)
    for part in (
        "does not fit recipe tiny", "backbone.embed_dim is 64 in the weights, 32 asked", "backbone.depth is 1",
        "init.architecture=weights", "backbone.embed_dim=64 backbone.depth=1",
    ):  # fmt: skip
        assert part in error, error
    assert not (tmp_path / "run").exists()


def test_other_heads_and_other_statistics(pretrain, source, tmp_path):
    words = ("dino_head.prototypes=16", "crops.mean=[0.5,0.5,0.5]", f"init={source / 'run'}")
    error = pretrain(tmp_path / "run", *words, status=2)
    for part in ("dino_head.prototypes is 32 in the weights, 16 asked", "init.heads=false", "crops.mean is (0.485"):
        assert part in error, error
    pretrain(tmp_path / "run", *words, "init.architecture=weights", "run.steps=1")
    config = run_config(tmp_path / "run")
    assert (config.dino_head.prototypes, config.crops.mean[0]) == (32, 0.485)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("init=/absent.pth",), ("/absent.pth does not exist",)),
        (("init.architecture=mine",), ("init.architecture", "recipe, weights", "'mine'")),
        (("init.architecture=weights",), ("expected init=SPEC", "got nothing")),
        (("optimizer.freeze_backbone=-1",), ("optimizer.freeze_backbone", "at least 0", "-1")),
    ],
)
def test_wrong_words(pretrain, tmp_path, words, parts):
    error = pretrain(tmp_path / "run", *words, status=2)
    for part in parts:
        assert part in error, error


def test_export_command(dinov3, source, tmp_path):
    out = tmp_path / "x.safetensors"
    status, text, error = dinov3(
        "export", f"backbone={source / 'run'}", "--to", "safetensors", f"out={out}", "heads=true"
    )
    assert status == 0, error
    for part in ("licence: your own weights", f"wrote {out}", "32 x 48 and 56 x 40", "differ by at most 0.0e+00"):
        assert part in text, text
    assert resolve(out).heads is not None
    status, _, error = dinov3("export", f"backbone={source / 'run'}", "to=safetensors", f"out={out}")
    assert (status, "exists; expected a new path" in error) == (2, True)
    by_suffix = tmp_path / "y.safetensors"
    assert dinov3("export", f"backbone={source / 'run'}", f"out={by_suffix}")[0] == 0
    assert resolve(by_suffix).heads is None
    status, _, error = dinov3("export", f"backbone={source / 'run'}", f"out={tmp_path / 'folder'}")
    assert (status, "expected to=hf, timm" in error) == (2, True)
    assert "heads expects" in dinov3("export", "backbone=x", "to=hf", f"out={out}", "heads=maybe")[2]


def test_continual_recipe_from_a_run_of_its_own(dinov3, recipe_file, image_folder, source, tmp_path):
    words = (f"data={image_folder}", f"out={tmp_path / 'run'}", "crops.global_size=32", "crops.local_size=16")
    quick = ("run.steps=3", "run.batch_size=8", "run.drift_every=2", "data.workers=0", "run.tensorboard=false")
    status, _, error = dinov3("pretrain", "recipe=continual_tiny_cpu", *words, *quick)
    assert (status, "expected init=SPEC" in error) == (2, True)
    status, text, error = dinov3(
        "pretrain", "recipe=continual_tiny_cpu", f"init={source / 'run'}", *words, *quick, "monitor.every=0"
    )
    assert status == 0, error
    config = run_config(tmp_path / "run")
    assert (config.backbone.embed_dim, config.optimizer.freeze_backbone) == (32, 100)
    assert "CLS 1.000, patches 1.000" in text


def test_a_stage_after_it_keeps_the_licence_and_does_not_import_again(pretrain, small_official, dinov3, tmp_path):
    words = (f"init={small_official}", "init.architecture=weights", "run.steps=4", "run.history_every=2")
    pretrain(tmp_path / "run", *words)
    small_official.unlink()
    status, text, error = dinov3(
        "refine", f"run={tmp_path / 'run'}", f"out={tmp_path / 'refined'}", "teacher=ema", "run.steps=2",
        "crops.gram_size=null", "gram.refresh_every=0",
    )  # fmt: skip
    assert status == 0, text + error
    config = run_config(tmp_path / "refined")
    assert (config.init.weights, config.init.licence) == (None, licences.DINOV3)
    assert resolve(tmp_path / "refined").licence == licences.DINOV3
    started, before = resolve(tmp_path / "refined", step=0), resolve(tmp_path / "run")
    assert same(started.backbone.state_dict(), before.backbone.state_dict())


def test_students_keep_the_licence_of_their_teacher(source, small_official):
    config, console = run_config(source / "run"), Console(quiet=True)
    of_imported = distillation.seen_by(config, resolve(small_official), console).init
    assert (of_imported.licence, of_imported.origin) == (licences.DINOV3, f"distilled from {small_official}")
    assert distillation.seen_by(config, resolve(source / "run"), console).init.licence is None
