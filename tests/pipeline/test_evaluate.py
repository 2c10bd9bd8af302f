"""Every probe as a command: what it prints and writes, its presets, and one clear line for wrong input."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov3_train import presets
from dinov3_train.commands_evaluate import PROBES, read
from dinov3_train.data.manifest import write_manifest
from dinov3_train.data.sources import open_source
from dinov3_train.evaluation.heads import HeadTraining

QUICK = ("steps=8", "learning_rates=0.01,0.1", "batch_size=8")


@pytest.fixture(scope="module")
def run(start_dinov3, recipe_file, image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "run"
    process = start_dinov3("pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", "run.steps=2")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """12 images in two classes with a mask, a depth map and a .json beside each."""
    root = tmp_path_factory.mktemp("dense")
    for number in range(12):
        folder = root / ("left", "right")[number % 2]
        folder.mkdir(exist_ok=True)
        mask = np.zeros((40, 40), np.uint8)
        mask[:, 20 * (number % 2) : 20 + 20 * (number % 2)] = 1
        noise = np.random.default_rng(number).integers(0, 100, (40, 40, 3))
        Image.fromarray((noise + 150 * mask[..., None]).astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}.mask.png")
        Image.fromarray(1000 + 500 * mask.astype(np.uint16)).save(folder / f"{number}.depth.png")
        (folder / f"{number}.json").write_text(json.dumps({"camera": ("old", "new")[number // 6]}))
    return root


@pytest.fixture
def evaluate(dinov3, run, dense_folder):
    """`dinov3 evaluate`; RUN and DATA stand for paths; an error is checked to be one line."""

    def call(probe: str, *words: str, status: int = 0) -> str:
        words = [word.replace("RUN", str(run)).replace("DATA", str(dense_folder)) for word in words]
        got, text, error = dinov3("evaluate", probe, *words)
        assert got == status, text + error
        if status:
            assert error.startswith("dinov3: error: "), error
            assert error.count("\n") == 1, error
        return error if status else text

    return call


BOTH = ("train=DATA", "test=DATA")
CALLS = {
    "knn": (*BOTH, "k=3"),
    "logistic": (*BOTH, "strengths=0.1,1", "shots=4"),
    "linear": (*BOTH, *QUICK, "views=2"),
    "segment": (*BOTH, *QUICK, "images=8"),
    "depth": (*BOTH, *QUICK, "bins=8"),
    "match": ("data=DATA", "images=7"),
    "retrieve": ("gallery=DATA",),
    "robustness": (*BOTH, "scales=0.5,2", "k=3"),
}


@pytest.mark.parametrize("probe", PROBES)
def test_prints_and_writes(evaluate, tmp_path, probe):
    path = tmp_path / "result.json"
    text = evaluate(probe, "backbone=RUN", "group=camera", f"out={path}", *CALLS[probe])
    written = json.loads(path.read_text())
    assert written["probe"] == probe
    assert written["settings"]["size"] == 32
    assert written["settings"]["backbone"]
    assert written["settings"]["group"] == "camera"
    assert set(written["groups"]["scores"]) == {"old", "new"}
    assert "2 groups: worst" in text
    if probe == "knn":
        assert f"k=3: accuracy {written['scores'][0]['accuracy']:.4f}" in text
    else:
        for name, found in written["metrics"].items():
            assert f"{name.replace('_', ' ')} {found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]" in text
            assert found["low"] <= found["value"] <= found["high"]


@pytest.mark.parametrize("probe", PROBES)
def test_options_are_listed(dinov3, probe):
    status, text, _ = dinov3("evaluate", probe, "options")
    assert status == 0
    assert all(f"{name}=" in text for name in PROBES[probe].options)
    assert all(f"preset={name}" in text for name in presets.PRESETS.get(probe, {}))


def test_keypoint_pairs(evaluate, dense_folder, tmp_path):
    pair = {"source": "left/0.png", "target": "left/2.png", "source_points": [[5, 5]], "target_points": [[5, 5]]}
    (dense_folder / "pairs.json").write_text(json.dumps([pair] * 2))
    assert "2 pairs, 2 points" in evaluate("match", "backbone=RUN", "pairs=DATA/pairs.json")


def test_step_0_is_the_untrained_start(evaluate):
    assert evaluate("retrieve", "backbone=RUN", "step=0", "gallery=DATA", "queries=DATA") != evaluate(
        "retrieve", "backbone=RUN", "gallery=DATA", "queries=DATA"
    )


def test_groups_are_columns_of_a_manifest(evaluate, dense_folder, tmp_path):
    source = open_source(dense_folder)
    count = len(source)
    block = {
        "source": [str(dense_folder)] * count,
        "index": range(count),
        "name": [source.name(n) for n in range(count)],
    }
    block |= {"width": [40] * count, "height": [40] * count, "hash": [""] * count, "cluster_path": [[]] * count}
    block |= {"retrieval_seed": [""] * count, "duplicate_group": [-1] * count, "part": ["a", "b"] * (count // 2)}
    path = write_manifest(tmp_path / "test.parquet", [block], {})
    table = pq.read_table(path)
    pq.write_table(table.append_column("region", pa.array(["north"] * 4 + ["south"] * 8)), path)
    for group, name in (("region", "north"), ("part", "a")):
        text = evaluate("segment", "backbone=RUN", "train=DATA", f"test={path}", f"group={group}", *QUICK)
        assert "2 groups: worst" in text
        assert f"group {name}: miou" in text


@pytest.mark.parametrize(("probe", "name"), [(p, n) for p, named in presets.PRESETS.items() for n in named])
def test_a_preset_sets_every_value_it_names_and_words_win(probe, name):
    required = [f"{key}=x" for key, option in PROBES[probe].options.items() if option.required]
    wanted = presets.preset(probe, name).values
    values = read(probe, ["backbone=x", f"preset={name}", *required])
    assert {key: values[key] for key in wanted} == wanted
    assert read(probe, ["backbone=x", f"preset={name}", "size=64", *required])["size"] == 64
    training = {key: value for key, value in wanted.items() if key in HeadTraining.__dataclass_fields__}
    if "learning_rates" in training:
        HeadTraining(**training)  # a combination that can be trained


def test_a_preset_reaches_the_result(evaluate, tmp_path):
    path = tmp_path / "knn.json"
    text = evaluate("knn", "backbone=RUN", *BOTH, "preset=dinov3", "size=32", "short_side=40", "k=2", f"out={path}")
    assert "preset dinov3: as the released evaluation" in text
    settings = json.loads(path.read_text())["settings"]
    assert (settings["preset"], settings["short_side"], settings["size"]) == ("dinov3", 40, 32)


MISTAKES = [
    ("segment", (*BOTH, "classes=1"), ("class indices from 0 to 0", "255 for void", "got 1")),
    ("segment", (*BOTH, "images=50"), ("images: expected 1 to 12", "got 50")),
    ("segment", (*BOTH, "size=30"), ("multiple of the patch size 8", "got 30")),
    ("segment", (*BOTH, "layer=9", *QUICK), ("layers expects 1 to 2 blocks from 0",)),
    ("segment", (*BOTH, "learning_rates=0"), ("learning_rates: expected numbers above 0",)),
    ("segment", (*BOTH, "steps=many"), ("steps expects", "'many'")),
    ("depth", (*BOTH, "bins=1"), ("bins: expected at least 2",)),
    ("knn", (*BOTH, "k=100"), ("k expects numbers from 1 to the 12 training images",)),
    ("robustness", (*BOTH, "k=100"), ("k expects numbers from 1 to the 12 training images",)),
    ("robustness", ("test=DATA", "scales=1"), ("a factor other than 1",)),
    ("match", (), ("data=PATH", "pairs=FILE.json")),
    ("match", ("data=DATA", "images=0"), ("images: expected at least 1, got 0",)),
    ("match", ("pairs=absent.json", "group=camera"), ("name their own",)),
    ("match", ("pairs=absent.json",), ("absent.json cannot be read",)),
    ("retrieve", ("gallery=DATA/left",), ("labelled gallery images",)),
    ("linear", ("train=DATA/left", "test=DATA"), ("labelled training images",)),
    ("logistic", (*BOTH, "held_out=2"), ("held_out: expected a share",)),
    ("logistic", (*BOTH, "group=weather"), ("group: expected a column", "'weather'")),
    ("logistic", (*BOTH, "pooling=max"), ("pooling", "max")),
    ("logistic", (*BOTH, "preset=dinov2"), ("preset: evaluate logistic has dinov3", "nearest: dinov3")),
    ("retrieve", ("gallery=DATA", "preset=dinov3"), ("preset: evaluate retrieve has none",)),
    ("linear", (*BOTH, "optimiser=sgd"), ("unknown option 'optimiser'", "optimizer")),
    ("linear", (*BOTH, "out=result.txt"), (".json",)),
    ("linear", ("test=DATA",), ("missing train=",)),
]


@pytest.mark.parametrize(("probe", "words", "parts"), MISTAKES, ids=[f"{p}-{' '.join(w)}" for p, w, _ in MISTAKES])
def test_wrong_input_is_one_clear_line(evaluate, probe, words, parts):
    error = evaluate(probe, "backbone=RUN", *words, status=2)
    for part in parts:
        assert part in error


def test_images_without_masks_depth_or_labels(dinov3, run, image_folder):
    for probe, part in (("segment", "training images with masks"), ("depth", "NAME.depth.png")):
        words = (f"backbone={run}", f"train={image_folder}", f"test={image_folder}")
        status, _, error = dinov3("evaluate", probe, *words)
        assert (status, error.count("\n")) == (2, 1)
        assert part in error


def test_one_class_only(evaluate, dense_folder, tmp_path):
    (tmp_path / "only").mkdir()
    for number in range(0, 12, 2):
        (tmp_path / "only" / f"{number}.png").write_bytes((dense_folder / "left" / f"{number}.png").read_bytes())
    error = evaluate("linear", "backbone=RUN", f"train={tmp_path}", f"test={tmp_path}", status=2)
    assert "at least two classes among the training images, got 1" in error
