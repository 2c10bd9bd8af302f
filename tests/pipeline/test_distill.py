"""`dinov3 distill` through the command line: students that are runs, kills, groups of ranks, fresh heads, mistakes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from dinov3_train.build import load, run_config
from dinov3_train.weights import resolve

STUDENTS = ("vit_micro", "convnext_micro")
RECIPE = '''
"""A distillation of seconds."""
from dataclasses import replace
from dinov3_train.config import Config, Crops, Data, Distillation, Head, Losses, Masking, Monitor, Optimizer, Run


def tiny_distill() -> Config:
    head = Head(hidden=32, bottleneck=16, prototypes=32)
    return Config(
        recipe="tiny_distill",
        dino_head=head,
        ibot_head=head,
        crops=Crops(locals=2, global_size=32, local_size=16),
        masking=Masking(hide=False),
        data=Data(workers=0),
        losses=Losses(koleo_group=2),
        optimizer=Optimizer(lr=1e-3, lr_rule="none", warmup=3, cooldown=6),
        distillation=Distillation(students=("vit_micro", "convnext_micro"), head_steps=0),
        monitor=Monitor(every=0),
        run=Run(steps=12, batch_size=8, checkpoint_every=4, log_every=2, tensorboard=False),
    )
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny_distill.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def teacher(start_dinov3, recipe_file, image_folder, tmp_path_factory):
    """A pretraining run of ten steps, which also kept a backbone without heads."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    words = (f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", "run.steps=10", "run.history_every=10")
    process = start_dinov3("pretrain", *words, "monitor.every=0")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


@pytest.fixture(scope="module")
def words(recipe, teacher, image_folder):
    return (
        f"recipe={recipe}",
        f"teacher={teacher}",
        f"data={image_folder}",
        "run.precision=fp32",
        "optimizer.clip=null",
    )


@pytest.fixture(scope="module")
def whole(start_dinov3, words, tmp_path_factory):
    """Both students, in one process, not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start_dinov3("distill", *words, f"out={out}")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


def weights(run):
    return load(run).state_dict()


def same(one, other, names=STUDENTS) -> bool:
    pairs = [(weights(one / name), weights(other / name)) for name in names]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def test_every_student_is_a_run(whole, dinov3, image_folder, tmp_path):
    for name in STUDENTS:
        config = run_config(whole / name)
        assert config.backbone.name == name
        assert config.backbone.patch_size == 8  # the teacher's
        assert config.masking.hide is False
        found = resolve(whole / name)
        features = found.backbone.features(torch.zeros(1, 3, 32, 32))
        assert features.grid == (4, 4)  # a ConvNeXt too, whose stride is 16
        assert found.heads is not None
        lines = [json.loads(line) for line in (whole / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
        assert lines[-1]["epochs"] == 12 * config.run.batch_size / 40
        assert lines[-1]["learning_rate"] < 0.1 * lines[2]["learning_rate"]  # the cool-down
        assert len({line["dino_global"] for line in lines}) == 6
        untrained, trained = load(whole / name, step=0).state_dict(), weights(whole / name)
        assert not torch.equal(untrained["norm.weight"], trained["norm.weight"])
        status, text, error = dinov3(
            "evaluate", "knn", f"backbone={whole / name}", f"train={image_folder}", f"test={image_folder}"
        )
        assert status == 0, error
        assert "mean per class" in text


def test_students_do_not_see_each_other(whole, words, dinov3, tmp_path):
    status, _, error = dinov3("distill", *words, "students=convnext_micro", f"out={tmp_path / 'alone'}")
    assert status == 0, error
    assert same(whole, tmp_path / "alone", ("convnext_micro",))


def test_killed_at_random_moments(whole, start_dinov3, words, tmp_path):
    out, generator = tmp_path / "out", random.Random(1)
    for _ in range(3):
        process = start_dinov3("distill", *words, f"out={out}")
        deadline = time.monotonic() + 120
        while not (out / "convnext_micro" / "config.yaml").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.02)
        time.sleep(generator.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start_dinov3("distill", *words, f"out={out}")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert same(whole, out)


def test_a_kill_between_two_checkpoints_goes_back_to_the_step_both_have(whole, dinov3, words, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "vit_micro" / "checkpoints" / "step_00000012")  # killed before the other's turn
    status, text, error = dinov3("distill", *words, f"out={out}")
    assert status == 0, error
    assert "continuing at step 8" in text
    assert same(whole, out)
    steps = [json.loads(line)["step"] for line in (out / "convnext_micro" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]


def distributed(ranks: int, *words: str) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "-m", "dinov3_train.cli", "distill", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def close(one, other, names=STUDENTS):
    for name in names:
        ours, theirs = weights(one / name), weights(other / name)
        for key, weight in ours.items():
            # sums come in another order; AdamW can turn a rounding of a gradient near 0 into a share of a step: 12
            # steps of at most 1e-3 under an EMA momentum of .994
            torch.testing.assert_close(theirs[key], weight, rtol=0, atol=2e-5, msg=lambda t, k=key: f"{k}: {t}")


def test_a_group_of_ranks_for_each_student_continues_what_one_rank_began(whole, words, tmp_path):
    """Rank 0 trains the ViT and rank 1 the ConvNeXt on all images; each runs the teacher on half of them."""
    out = tmp_path / "groups"
    shutil.copytree(whole, out)
    for name in STUDENTS:  # continue one rank's eight steps on two
        shutil.rmtree(out / name / "checkpoints" / "step_00000012")
    text = distributed(2, *words, f"out={out}")
    assert "vit_micro/8 on 1 rank, convnext_micro/8 on 1 rank" in text
    assert "continuing at step 8" in text
    close(whole, out)


def test_two_ranks_that_share_a_student_equal_one(whole, words, tmp_path):
    distributed(2, *words, f"out={tmp_path / 'out'}", "students=vit_micro")
    close(whole, tmp_path / "out", ("vit_micro",))


def test_the_teacher_sees_larger_crops(words, dinov3, tmp_path):
    out = tmp_path / "out"
    more = ("distillation.teacher_size=64", "run.steps=2", "convnext_micro.optimizer.lr=5e-4")
    status, text, error = dinov3("distill", *words, *more, f"out={out}")
    assert status == 0, error
    assert "at 64 px" in text
    rates = [run_config(out / name).optimizer.lr for name in STUDENTS]
    assert rates == [1e-3, 5e-4]
    assert load(out / "convnext_micro").features(torch.zeros(1, 3, 32, 32)).grid == (4, 4)


def test_a_teacher_without_heads_gets_them_first(teacher, words, dinov3, tmp_path):
    out, backbone = tmp_path / "out", teacher / "history" / "step_00000010.safetensors"
    more = (f"teacher={backbone}", "distillation.head_steps=4", "run.steps=4", f"out={out}")
    status, text, error = dinov3("distill", *words, *more)
    assert status == 0, error
    assert "heads of the teacher, which comes without: 4 steps" in text
    made = resolve(out / "teacher")
    wanted = resolve(backbone).backbone.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in made.backbone.state_dict().items())
    fresh = resolve(out / "teacher", step=0).heads["dino_head"].state_dict()
    learnt = made.heads["dino_head"].state_dict()
    assert not torch.equal(fresh["prototypes.weight"], learnt["prototypes.weight"])
    before = weights(out / "vit_micro")
    status, text, _ = dinov3("distill", *words, *more[:2], "run.steps=6", f"out={out}")
    assert status == 0
    assert "continuing at step 4" in text
    assert not all(torch.equal(value, before[key]) for key, value in weights(out / "vit_micro").items())


MISTAKES = {
    "dino_head.prototypes=16": (
        "dino_head.prototypes",
        "the 32 of the teacher",
        "got 16",
        "set dino_head.prototypes=32",
    ),
    "ibot_head.prototypes=64": ("ibot_head.prototypes", "the 32 of the teacher", "got 64"),
    "convnext_micro.dino_head.prototypes=16": ("dino_head.prototypes", "convnext_micro"),
    "students=vit_micro,convnext_mikro": ("no backbone named 'convnext_mikro'", "nearest: convnext_micro"),
    "students=vit_micro,vit_micro": ("each once",),
    "distillation.groups=[2,1]": ("the group of vit_micro has 2 ranks", "world's 1"),
    "distillation.groups=[1]": ("one size for each of the 2 students",),
    "crops.global_size=40": ("crops.global_size", "convnext_micro", "stride of 16", "got 40"),
    "crops.local_size=24": ("crops.local_size", "convnext_micro", "stride of 16", "got 24"),
    "crops.global_size=36": ("crops.global_size", "got 36"),
    "distillation.teacher_size=60": ("distillation.teacher_size", "multiple of 8 pixels", "got 60"),
    "vit_micro.backbone.patch_size=16": ("vit_micro.backbone.patch_size", "the teacher's 8", "got 16"),
    "vit_micro.run.steps=3": ("students may differ in", "vit_micro.run.steps=3"),
    "vit_micro.backbone.depths=[2]": ("backbone.depths is no key of a Backbone",),
    "teacher=HISTORY": ("expected a teacher with DINO and iBOT heads", "has none", "distillation.head_steps"),
    "teacher=/absent": ("/absent",),
    "teacher=": ("distillation.teacher", "got nothing", "teacher=RUN"),
    "gram.weight=2": ("gram.weight", "without a Gram term"),
    "run.keep=1": ("run.keep", "at least 2"),
    "run.batch_size=6 losses.koleo_group=4": ("losses.koleo_group",),
    "init.weights=/somewhere": ("init.weights",),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_before_any_work(dinov3, words, teacher, tmp_path, mistake):
    history = str(teacher / "history" / "step_00000010.safetensors")
    out = tmp_path / "out"
    status, text, error = dinov3("distill", *words, *mistake.replace("HISTORY", history).split(), f"out={out}")
    assert status == 2, text + error
    assert error.startswith("dinov3: error: "), error
    assert error.count("\n") == 1, error
    for part in MISTAKES[mistake]:
        assert part in error
    assert not out.exists()


def test_another_run_and_another_command_are_refused(dinov3, words, whole, recipe, image_folder, tmp_path):
    status, _, error = dinov3("distill", *words, f"out={whole}", "optimizer.lr=1e-2")
    assert status == 2
    assert "optimizer.lr: 0.001 there, 0.01 asked" in error
    status, _, error = dinov3("pretrain", f"recipe={recipe}", f"data={image_folder}", f"out={tmp_path / 'run'}")
    assert status == 2
    assert "it is for dinov3 distill" in error


def test_pretraining_another_architecture_by_name(dinov3, recipe_file, image_folder, tmp_path):
    words = (f"recipe={recipe_file}", f"data={image_folder}", "architecture=convnext_micro", "run.steps=2")
    status, _, error = dinov3("pretrain", *words, f"out={tmp_path / 'refused'}")
    assert status == 2
    assert "masking.hide: expected false for convnext_micro" in error
    status, text, error = dinov3("pretrain", *words, "masking.hide=false", f"out={tmp_path / 'run'}")
    assert status == 0, error
    assert "convnext_micro/8" in text
    assert load(tmp_path / "run").stride == 16
