"""Mixtures and manifests through the command line: the counts that are logged, resumes, two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dinov3_train.build import load
from dinov3_train.data.manifest import content_hash, write_manifest
from dinov3_train.data.sources import open_source


@pytest.fixture(scope="module")
def manifest(image_folder, tmp_path_factory):
    """Half of the blobs, and half of them again as another part."""
    source = open_source(image_folder)
    numbers = [number for number in range(len(source)) if "blobs" in source.name(number)]
    columns = {
        "source": [str(image_folder)] * len(numbers),
        "index": numbers,
        "name": [source.name(number) for number in numbers],
        "width": [40] * len(numbers),
        "height": [48] * len(numbers),
        "hash": [content_hash(source.read(number)) for number in numbers],
        "cluster_path": [[]] * len(numbers),
        "retrieval_seed": [""] * len(numbers),
        "duplicate_group": [-1] * len(numbers),
        "part": ["raw", "retrieval"] * (len(numbers) // 2),
    }
    return write_manifest(tmp_path_factory.mktemp("manifest") / "m.parquet", [columns], {"made": "here"})


@pytest.fixture(scope="module")
def mixture(recipe_file, image_folder, manifest) -> list[str]:
    return [
        f"recipe={recipe_file}",
        f"data={image_folder},{manifest}:part=retrieval",
        "data.weights=[3,1]",
        "data.homogeneous=[m:retrieval]",
        "data.homogeneous_share=0.3",
    ]


def weights(run) -> dict:
    return load(run).state_dict()


@pytest.fixture(scope="module")
def whole(start_dinov3, mixture, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "run"
    process = start_dinov3("pretrain", *mixture, f"out={out}", "run.precision=fp32", "optimizer.clip=null")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out, text


def test_counts_are_said_and_logged(whole, image_folder):
    out, text = whole
    assert f"  {image_folder.name}: 40 images, 75 % of mixed steps, 0 % of steps of its own" in text
    assert "  m:retrieval: 10 images, 25 % of mixed steps, 30 % of steps of its own" in text
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]  # the others are the health monitor's
    for line in lines:
        drawn = line[f"drawn/{image_folder.name}"], line["drawn/m:retrieval"]
        alone = line["homogeneous_steps"]
        assert drawn == (6 * (line["step"] - alone), 2 * (line["step"] - alone) + 8 * alone)
        assert line["epochs/m:retrieval"] == drawn[1] / 10
    assert lines[-1]["homogeneous_steps"] > 0
    assert f"epochs {image_folder.name} {lines[-1][f'epochs/{image_folder.name}']:.2f}, m:retrieval" in text


def test_a_resume_ends_in_the_same_weights(whole, dinov3, mixture, tmp_path):
    out, words = tmp_path / "run", (*mixture, "run.precision=fp32", "optimizer.clip=null", "data.workers=1")
    assert dinov3("pretrain", *words, f"out={out}", "run.steps=5")[0] == 0
    status, text, error = dinov3("pretrain", *words, f"out={out}")
    assert status == 0, error
    assert "continuing at step 5" in text
    one, other = weights(whole[0]), weights(out)
    assert all(torch.equal(one[name], other[name]) for name in one)
    logged = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole[0], out)
    ]
    kept = [[{k: v for k, v in line.items() if k.startswith(("drawn", "step"))} for line in run[-4:]] for run in logged]
    assert kept[0] == kept[1]
    status, _, error = dinov3("pretrain", *words, f"out={out}", "data.weights=[1,1]")
    assert status == 2
    assert "data.weights: (3.0, 1.0) there, (1.0, 1.0) asked" in error


def test_two_ranks_see_what_one_sees(whole, mixture, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*mixture, f"out={tmp_path / 'two'}", "run.precision=fp32", "optimizer.clip=null"]
    command = [*launch, "-m", "dinov3_train.cli", "pretrain", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    one, two = weights(whole[0]), weights(tmp_path / "two")
    for name, weight in one.items():  # sums over ranks come in another order: see test_torchrun
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("data.weights=[1,2,3]",), ("data.weights", "2 sources, got 3")),
        (("data.weights=[1,-1]",), ("data.weights", "-1")),
        (("data.homogeneous=[nothing]",), ("data.homogeneous", "nothing", "nearest")),
        (("data.homogeneous_share=0",), ("data.homogeneous", "above 0")),
        (("data.homogeneous_share=2",), ("data.homogeneous_share", "got 2")),
    ],
)
def test_mixtures_that_cannot_be(dinov3, mixture, tmp_path, words, parts):
    status, _, error = dinov3("pretrain", *mixture, f"out={tmp_path / 'run'}", *words)
    assert status == 2
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert not (tmp_path / "run").exists()


def test_a_manifest_serves_every_command(whole, dinov3, manifest, tmp_path):
    run = whole[0]
    status, _, error = dinov3("features", f"backbone={run}", f"data={manifest}", f"out={tmp_path / 'f.npy'}")
    assert status == 0, error
    status, _, error = dinov3("visualize", "pca", f"backbone={run}", f"data={manifest}", f"out={tmp_path / 'p.png'}")
    assert status == 0, error
    both = f"{manifest},{run.parent}"  # not a manifest, not a folder of images
    status, _, error = dinov3("features", f"backbone={run}", f"data={both}", f"out={tmp_path / 'g.npy'}")
    assert status == 2
    assert "no image below" in error


def test_a_manifest_is_judged_by_labels(whole, dinov3, manifest, image_folder, tmp_path):
    source = open_source(image_folder)
    assert source.classes == ["blobs", "stripes"]
    words = (f"backbone={whole[0]}", f"train={image_folder}", f"test={manifest}", "k=3")
    status, text, error = dinov3("evaluate", "knn", *words)
    assert status == 0, error
    assert "40 training and 20 test images" in text


def test_a_manifest_whose_images_are_gone(dinov3, recipe_file, manifest, tmp_path):
    (tmp_path / "cut.parquet").write_bytes(manifest.read_bytes()[:500])
    for data, part in ((tmp_path / "cut.parquet", "no readable Parquet"), (tmp_path / "no.parquet", "does not exist")):
        status, _, error = dinov3("pretrain", f"recipe={recipe_file}", f"data={data}", f"out={tmp_path / 'run'}")
        assert status == 2
        assert part in error
        assert error.count("\n") == 1
