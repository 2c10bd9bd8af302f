"""Wrong input ends in one clear line, before work is lost."""

from __future__ import annotations

import shutil
import tarfile

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def finished_run(start_dinov3, recipe_file, image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    process = start_dinov3("pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", "run.steps=10")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


@pytest.fixture
def pretrain(dinov3, recipe_file, image_folder, tmp_path):
    """`dinov3 pretrain` of two steps with words replaced or added; checks that an error is one line."""

    def run(*more: str, recipe=recipe_file, data=image_folder, out=tmp_path / "run", status: int = 2) -> str:
        words = [f"recipe={recipe}", f"data={data}", f"out={out}", "run.steps=2", *more]
        got, text, error = dinov3("pretrain", *words)
        assert got == status, text + error
        if status:
            assert error.startswith("dinov3: error: "), error
            assert error.count("\n") == 1, error
        return error if status else text

    return run


CONFIG_MISTAKES = {
    "optimizer.lrr=1": ("unknown key 'optimizer.lrr'", "optimizer.lr"),
    "optimiser.lr=1": ("unknown key 'optimiser.lr'", "optimizer.lr"),
    "run.steps=many": ("run.steps expects int", "'many'"),
    "crops.global_scale=[0.5]": ("crops.global_scale expects",),
    "dino_head.prototypes=1": ("dino_head.prototypes", "at least 2", "got 1"),
    "crops.global_size=30": ("crops.global_size", "multiple of the patch size 8", "got 30", "24", "32"),
    "run.accumulate=3": ("run.batch_size", "multiple of 1 ranks * 3 micro-batches", "got 8"),
    "losses.koleo_group=3": ("losses.koleo_group", "got 3"),
    "run.batch_size=1": ("losses.koleo_group",),
    "losses.koleo=-1": ("losses", "at least 0", "koleo=-1"),
    "run.precision=fp8": ("run.precision", "bf16, fp32", "'fp8'"),
    "backbone.drop_path=1.0": ("backbone.drop_path", "[0, 1)"),
    "run.checkpoint_every=0": ("run.checkpoint_every", "at least 1"),
    "run.steps=0": ("run.steps", "at least 1"),
    "config=absent.yaml": ("absent.yaml", "does not exist"),
    "monitor.every=-1": ("monitor.every", "at least 0"),
    "monitor.images=1": ("monitor.images", "at least 2, got 1"),
    "data.labelled=[a]": ("data.labelled", "two sources"),
    "nonsense": ("expected name=value", "'nonsense'"),
    "stepps=3": ("unknown option 'stepps'",),
}


@pytest.mark.parametrize("word", CONFIG_MISTAKES)
def test_settings(pretrain, tmp_path, word):
    error = pretrain(word)
    for part in CONFIG_MISTAKES[word]:
        assert part in error
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_recipe_that_does_not_exist(pretrain):
    assert "nearest: vit_small" in pretrain(recipe="vit_smal")


def test_recipe_file_without_its_function(pretrain, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("answer = 42\n")
    assert "must hold a function mine()" in pretrain(recipe=path)


def test_missing_folder(pretrain, tmp_path):
    assert "absent" in pretrain(data=tmp_path / "absent")


def test_empty_folder(pretrain, tmp_path):
    (tmp_path / "empty").mkdir()
    error = pretrain(data=tmp_path / "empty")
    assert "empty" in error
    assert "jpg" in error  # names the suffixes it looked for


def test_torchvision_name_that_does_not_exist(pretrain):
    assert "CIFAR10" in pretrain(data="torchvision:CIFR10")


def test_truncated_tar(pretrain, image_folder, tmp_path):
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    with tarfile.open(whole, "w") as shard:
        for path in sorted(image_folder.rglob("*.png")):
            shard.add(path, path.name)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2 + 100])
    error = pretrain(data=cut)
    assert "cut.tar" in error
    assert "truncated" in error


def test_corrupt_image_is_named_and_skipped(pretrain, image_folder, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "blobs" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    text = pretrain("run.steps=12", "data.max_unreadable=0.05", data=folder, status=0)
    assert text.count("broken.png") == 1


def test_too_many_corrupt_images_stop_with_the_list(pretrain, image_folder, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    for number in range(5):
        (folder / "blobs" / f"broken{number}.png").write_bytes(b"nothing")
    error = pretrain("run.steps=12", data=folder)
    assert "broken" in error
    assert "unreadable" in error


def test_out_is_a_file(pretrain, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "expected a folder" in pretrain(out=tmp_path / "file")


def test_out_holds_something_else(pretrain, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    assert "is not a run" in pretrain(out=tmp_path / "photos")
    assert (tmp_path / "photos" / "a.png").exists()


def test_run_of_another_architecture_is_not_continued(pretrain, finished_run):
    error = pretrain("backbone.depth=3", out=finished_run)
    assert "backbone.depth: 2 there, 3 asked" in error


def test_checkpoint_of_another_architecture(pretrain, finished_run, tmp_path):
    out = tmp_path / "other"
    shutil.copytree(finished_run, out)
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config.replace("depth: 2", "depth: 3"))
    error = pretrain("backbone.depth=3", "run.steps=12", out=out)
    assert "another architecture" in error
    assert "missing" in error


def test_damaged_checkpoint(pretrain, finished_run, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(finished_run, out)
    for shard in (out / "checkpoints" / "step_00000010").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:1000])
    error = pretrain("run.steps=12", out=out)
    assert "step_00000010" in error
    assert "step_00000005" in error  # what there is to fall back to


def test_full_disk_while_saving_keeps_the_earlier_checkpoint(
    start_dinov3, recipe_file, image_folder, finished_run, tmp_path
):
    import resource

    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    words = ["pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", "run.steps=12"]
    limit = 100_000  # bytes per file: less than a checkpoint, as a disk that fills up while it is written

    process = start_dinov3(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    last = text.strip().splitlines()[-1]
    assert last.startswith("dinov3: error: checkpoint of step 12 could not be written"), text
    assert "complete checkpoint: 10" in last
    assert "Traceback" not in text
    assert not list((out / "checkpoints").glob("*.partial"))

    process = start_dinov3(*words)  # with room again, the same command continues
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "continuing at step 10" in text


def test_loss_that_is_never_finite_stops_and_keeps_the_weights(pretrain, tmp_path):
    error = pretrain("losses.student_temperature=1e-30", "run.max_skipped=1", "run.steps=8", status=1)
    assert "not finite" in error
    assert ".png" in error  # the images' names


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("train=DATA", "test=DATA", "backbone=/absent"), ("run folder", "/absent")),
        (("train=DATA", "test=DATA", "backbone=RUN", "step=7"), ("no checkpoint of step 7", "10")),
        (("train=DATA", "test=DATA", "backbone=RUN", "k=1000"), ("k", "1000")),
        (("train=DATA", "test=DATA", "backbone=RUN", "size=30"), ("multiple of the patch size 8", "got 30")),
        (("train=DATA", "test=DATA", "backbone=RUN", "pooling=max"), ("pooling", "max")),
        (("train=DATA", "backbone=RUN"), ("missing test=",)),
        (("train=DATA/blobs", "test=DATA/blobs", "backbone=RUN"), ("label",)),
    ],
)
def test_knn(dinov3, finished_run, image_folder, words, parts):
    words = [word.replace("RUN", str(finished_run)).replace("DATA", str(image_folder)) for word in words]
    status, text, error = dinov3("evaluate", "knn", *words)
    assert status == 2, text + error
    for part in parts:
        assert part in error


def test_picture_of_another_suffix(dinov3, finished_run, image_folder, tmp_path):
    status, _, error = dinov3(
        "visualize", "pca", f"backbone={finished_run}", f"data={image_folder}", f"out={tmp_path}/a.txt"
    )
    assert status == 2
    assert ".png" in error


def test_features_suffix(dinov3, finished_run, image_folder, tmp_path):
    status, _, error = dinov3("features", f"backbone={finished_run}", f"data={image_folder}", f"out={tmp_path}/a.csv")
    assert status == 2
    assert ".safetensors" in error
