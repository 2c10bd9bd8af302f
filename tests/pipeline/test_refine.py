"""`dinov3 refine` and `dinov3 adapt` as whole commands: where they begin, resumes to the bit, ranks, wrong input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dinov3_train.build import load, networks, run_config
from dinov3_train.train.checkpoint import load_teacher, saved_steps
from dinov3_train.weights import resolve

PRETRAIN = ("run.history_every=4", "run.precision=fp32", "optimizer.clip=null", "monitor.every=0")
REFINE = ("run.steps=12", "run.checkpoint_every=3", "gram.refresh_every=4", "gram.refreshes=2", "gram.ramp=3")
ADAPT = ("run.steps=10", "run.checkpoint_every=3", "crops.mix=[[32,16,48,0.5],[48,24,64,0.5]]", "crops.gram_size=64")


@pytest.fixture(scope="module")
def command():
    """Runs the command line in this process, for fixtures of a module; gives its output."""

    def run(*words: object) -> str:
        from dinov3_train.cli import app

        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            app([str(word) for word in words], standalone_mode=False)
        return said.getvalue()

    return run


@pytest.fixture(scope="module")
def pretrained(command, recipe_file, image_folder, tmp_path_factory) -> Path:
    """Ten steps with a thin history at 4 and 8, fp32 so that ranks can be compared."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    command("pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", "run.steps=10", *PRETRAIN)
    return out


@pytest.fixture(scope="module")
def refined(command, pretrained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("refined") / "run"
    command("refine", f"run={pretrained}", f"out={out}", *REFINE)
    return out


@pytest.fixture(scope="module")
def adapted(command, refined, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "run"
    command("adapt", f"run={refined}", f"out={out}", *ADAPT)
    return out


def same_weights(one, other) -> bool:
    """Of the newest checkpoints: student, EMA teacher, heads, moments and Gram teacher."""
    import torch.distributed.checkpoint as dcp

    found = []
    for run in (one, other):
        path = sorted((Path(run) / "checkpoints").iterdir())[-1]
        reader = dcp.FileSystemReader(path)
        entries = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if hasattr(entry, "size") and not name.startswith("random")
        }
        dcp.load(entries, checkpoint_id=path, no_dist=True)
        found.append(entries)
    first, second = found
    assert any(name.startswith("gram_teacher.") for name in first)
    assert any(name.startswith("optimizer.") for name in first)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_choice_is_explained_in_the_run_folder(refined, pretrained):
    record = json.loads((refined / "gram_teacher.json").read_text())
    assert [score["step"] for score in record["scores"]] == [0, 4, 5, 8, 10]  # untrained, history and checkpoints
    assert record["teacher"] == run_config(refined).gram.teacher
    assert record["teacher"].startswith(str(pretrained))
    assert record["reason"].startswith(f"step {record['step']} scores")
    assert any("no degradation" in warning for warning in record["warnings"])  # ten steps degrade nothing
    assert (refined / "gram_teacher.png").stat().st_size > 10_000


def test_it_begins_with_student_ema_heads_and_moments_in_a_folder_and_with_steps_of_its_own(
    command, pretrained, tmp_path
):
    """At rate 0 nothing moves: what is saved after one step is what the pretraining had."""
    out = tmp_path / "run"
    words = (
        "gram.refresh_every=0",
        "optimizer.lr=0",
        "run.steps=1",
        "optimizer.momentum=1.0",
        "optimizer.weight_decay=0",
    )
    text = command("refine", f"run={pretrained}", f"out={out}", "teacher=ema", *words)
    assert "beginning with the student of" in text
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000001"]
    config = run_config(out)
    assert config.start.run == str(pretrained / "checkpoints" / "step_00000010")
    assert config.run.seed != run_config(pretrained).run.seed
    before, after = networks(config), networks(config)
    load_teacher(pretrained / "checkpoints" / "step_00000010", before)
    load_teacher(out / "checkpoints" / "step_00000001", after)
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]), name


def test_step_0_of_a_refinement_is_what_it_began_with(refined, pretrained):
    began, whole = load(refined, step=0).state_dict(), load(pretrained).state_dict()
    assert all(torch.equal(began[name], whole[name]) for name in whole)


def test_history_can_be_resolved_by_step_and_by_file(pretrained):
    by_step = resolve(pretrained, step=4)
    by_file = resolve(pretrained / "history" / "step_00000004.safetensors")
    assert by_step.heads is by_file.heads is None
    weights, newest = by_step.backbone.state_dict(), load(pretrained).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in by_file.backbone.state_dict().items())
    assert any(not torch.equal(weights[name], newest[name]) for name in newest)


@pytest.mark.parametrize("stage", ["refine", "adapt"])
def test_killed_and_continued_ends_with_the_same_bits(stage, start_dinov3, command, request, tmp_path):
    whole = request.getfixturevalue({"refine": "refined", "adapt": "adapted"}[stage])
    run = request.getfixturevalue({"refine": "pretrained", "adapt": "refined"}[stage])
    out = tmp_path / "run"
    words = (stage, f"run={run}", f"out={out}", *{"refine": REFINE, "adapt": ADAPT}[stage])
    process = start_dinov3(*words)
    deadline = time.monotonic() + 300
    # killed as soon as there is a checkpoint, or while one is written
    while not list(out.glob("checkpoints/step_*")) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = saved_steps(out / "checkpoints")
    assert not saved or saved[-1] < 9, "the run was over before it was killed"
    text = command(*words)
    assert not saved or f"continuing at step {saved[-1]}" in text
    assert same_weights(whole, out)


def test_a_resume_keeps_its_start_and_teacher_though_the_pretraining_went_on(
    command, recipe_file, image_folder, pretrained, tmp_path
):
    run, out = tmp_path / "pretrained", tmp_path / "run"
    shutil.copytree(pretrained, run)
    command("refine", f"run={run}", f"out={out}", *REFINE, "run.steps=2", "run.checkpoint_every=2")
    began = run_config(out)
    command("pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={run}", "run.steps=11", *PRETRAIN)
    text = command("refine", f"run={run}", f"out={out}", *REFINE, "run.steps=4")
    assert "continuing at step 2" in text
    assert "dense quality" not in text  # nothing is scored again
    assert (run_config(out).start, run_config(out).gram) == (began.start, began.gram)


def test_two_ranks_are_one(pretrained, refined, tmp_path):
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "dinov3_train.cli", "refine", f"run={pretrained}", f"out={out}", *REFINE]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*launch, *words], capture_output=True, text=True, timeout=500, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert run_config(out) == run_config(refined)  # the same Gram teacher chosen
    one, two = load(refined).state_dict(), load(out).state_dict()
    for name, weight in one.items():
        # as in test_torchrun.py: sums over ranks in another order, AdamW's square root near 0, rate 6e-4
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def mistake(dinov3, pretrained, tmp_path):
    """A command that must fail with one line and leave no run behind; gives the line."""

    def run(command: str, *words: str, begin=pretrained) -> str:
        status, text, error = dinov3(command, f"run={begin}", f"out={tmp_path / 'out'}", *words)
        assert status == 2, text + error
        assert error.startswith("dinov3: error: "), error
        assert error.count("\n") == 1, error
        assert not (tmp_path / "out" / "config.yaml").exists()
        return error

    return run


REFINE_MISTAKES = {
    "crops.gram_size=24": ("gram_size", "at least the global crop's side 32", "got 24"),
    "crops.gram_size=60": ("gram_size", "multiple of the patch size 8", "got 60"),
    "gram.clip=some": ("gram.clip", "none, both, teacher", "'some'"),
    "gram.level=pixel": ("gram.level", "image, batch"),
    "gram.weight=-1": ("gram.weight", "at least 0"),
    "gram.weight=0": ("gram_size", "no Gram term"),
    "gram.crops=3": ("gram.crops", "1 to 2", "got 3"),
    "dino_head.prototypes=64": ("dino_head.prototypes: 32 there, 64 asked",),
    "backbone.depth=3": ("backbone.depth: 2 there, 3 asked",),
    "start.student=other": ("start.student", "student, teacher"),
    "teacher=/absent": ("/absent",),
    "recipe=vit_small_refine": ("another architecture", "embed_dim: 32 there, 384 asked"),
}


@pytest.mark.parametrize("word", REFINE_MISTAKES)
def test_mistakes_of_refine(mistake, word):
    error = mistake("refine", word, *(() if word.startswith("teacher") else ("teacher=ema", "gram.refresh_every=0")))
    for part in REFINE_MISTAKES[word]:
        assert part in error


ADAPT_MISTAKES = {
    "crops.mix=[[32,16,24,1.0]]": ("crops.mix[0]", "gram_size", "at least the global crop's side 32", "got 24"),
    "crops.mix=[[32,16,48,0.5],[50,16,64,0.5]]": ("crops.mix[1]", "global_size", "multiple of the patch size 8"),
    "crops.mix=[[32,16,48,0.5],[48,16,64,0.4]]": ("crops.mix", "sum to 1"),
    "crops.mix=[[32,16,48]]": ("crops.mix expects",),
    "optimizer.warmup_shape=step": ("optimizer.warmup_shape", "linear, cosine"),
}


@pytest.mark.parametrize("word", ADAPT_MISTAKES)
def test_mistakes_of_adapt(mistake, word):
    error = mistake("adapt", word)
    for part in ADAPT_MISTAKES[word]:
        assert part in error


def test_the_live_ema_is_never_refreshed(command, dinov3, pretrained, image_folder, tmp_path):
    """The default cadence is dropped for it; asked for by hand it is a mistake."""
    command("refine", f"run={pretrained}", f"out={tmp_path / 'run'}", "teacher=ema", "run.steps=1", "monitor.every=0")
    assert (run_config(tmp_path / "run").gram.teacher, run_config(tmp_path / "run").gram.refresh_every) == ("ema", 0)
    words = ("gram.teacher=ema", "gram.refresh_every=2", f"data={image_folder}", f"out={tmp_path / 'other'}")
    status, _, error = dinov3("pretrain", "recipe=vit_tiny_cpu_refine", *words)
    assert status == 2
    assert "the live EMA needs no refreshing" in error


def test_a_gram_teacher_of_another_patch_size(mistake, command, recipe_file, image_folder, tmp_path):
    other = tmp_path / "other"
    words = ("run.steps=1", "backbone.patch_size=16", f"data={image_folder}", f"out={other}", "monitor.every=0")
    command("pretrain", f"recipe={recipe_file}", *words)
    error = mistake("refine", f"teacher={other}")
    assert "patch size 16, expected the student's 8" in error
    assert "gram.teacher" in error


def test_auto_without_a_history(mistake, pretrained, tmp_path):
    run = tmp_path / "bare"
    shutil.copytree(pretrained, run)
    shutil.rmtree(run / "history")
    shutil.rmtree(run / "checkpoints" / "step_00000005")
    error = mistake("refine", "teacher=auto", begin=run)
    assert "kept 1 checkpoint, expected at least 2" in error
    assert "run.history_every" in error


def test_the_gram_stage_needs_a_teacher_when_trained_directly(dinov3, image_folder, tmp_path):
    status, _, error = dinov3(
        "pretrain", "recipe=vit_tiny_cpu_refine", f"data={image_folder}", f"out={tmp_path / 'run'}", "run.steps=1"
    )
    assert status == 2
    assert "gram.teacher" in error
    assert "teacher=auto" in error


def test_print_config_shows_the_stage(dinov3, pretrained):
    status, text, error = dinov3("refine", f"run={pretrained}", "--print-config")
    assert status == 0, error
    assert "gram_size: 64" in text
    assert "recipe: tiny_refine" in text


def test_from_weights_of_elsewhere(command, pretrained, recipe_file, image_folder, tmp_path):
    """`init=` in place of a run: the weights are taken, the recipe says the rest."""
    stage = tmp_path / "stage.py"
    stage.write_text(
        "from dinov3_train.stages import refinement\n"
        "from dinov3_train.recipes import recipe\n\n\n"
        f"def stage():\n    return refinement(recipe({str(recipe_file)!r}))\n"
    )
    words = (f"recipe={stage}", f"data={image_folder}", f"init={pretrained}", "teacher=ema", "gram.refresh_every=0")
    text = command("refine", *words, f"out={tmp_path / 'run'}", "run.steps=2", "monitor.every=0")
    assert "Gram teacher: the live EMA" in text
    assert str(pretrained) in text
    assert run_config(tmp_path / "run").start.run is None


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("out=OUT",), ("expected run=RUN or init=WEIGHTS", "neither")),
        (("out=OUT", "run=PRETRAINED", "init=PRETRAINED"), ("expected run=RUN or init=WEIGHTS", "both")),
        (("out=OUT", "init=PRETRAINED"), ("expected recipe=NAME",)),
        (("out=OUT", "init=PRETRAINED", "recipe=vit_tiny_cpu_refine"), ("teacher=auto", "expected teacher=WEIGHTS")),
    ],
)
def test_mistakes_of_the_beginning(dinov3, pretrained, tmp_path, words, parts):
    words = [word.replace("OUT", str(tmp_path / "run")).replace("PRETRAINED", str(pretrained)) for word in words]
    status, text, error = dinov3("refine", *words)
    assert status == 2, text + error
    for part in parts:
        assert part in error
