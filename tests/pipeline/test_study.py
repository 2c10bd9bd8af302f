"""`dinov3 study data` in small: four sets of one size, a run on each, a table; stopped and continued."""

from __future__ import annotations

import json

import pytest

from dinov3_train.data.manifest import read_manifest


@pytest.fixture(scope="module")
def run_folder(start_dinov3, recipe_file, image_folder, tmp_path_factory):
    """A run whose backbone sees the pool."""
    out = tmp_path_factory.mktemp("seeing") / "run"
    process = start_dinov3("pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", "run.steps=1")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


@pytest.fixture
def words(run_folder, recipe_file, image_folder, other_images, tmp_path):
    data = [
        f"pool={image_folder}",
        f"train={image_folder}",
        f"test={other_images}",
    ]  # nothing of the pool like the test
    more = [f"sets={image_folder / 'blobs'}", f"backbone={run_folder}", f"recipe={recipe_file}", "clusters=6,2"]
    return ["study", "data", *data, *more, "target=10", "steps=3", "threshold=0.9999", f"out={tmp_path / 'study'}"]


def test_four_sets_four_runs_and_a_table(dinov3, words, tmp_path):
    status, text, error = dinov3(*words)
    assert status == 0, error
    out = tmp_path / "study"
    sets = {
        name: read_manifest(out / "curation" / f"{name}.parquet") for name in ("raw", "clustering", "retrieval", "all")
    }
    assert all(table.num_rows == 10 for table in sets.values())
    assert all(len(set(table["name"].to_pylist())) == 10 for table in sets.values())
    assert set(sets["retrieval"]["part"].to_pylist()) == {"retrieval"}
    assert all(name.endswith(".png") for name in sets["retrieval"]["retrieval_seed"].to_pylist())
    assert sorted(sets["all"]["part"].to_pylist()) == ["clustering"] * 3 + ["raw"] * 4 + ["retrieval"] * 3
    results = json.loads((out / "results.json").read_text())
    assert [run["arm"] for run in results["runs"]] == list(sets)
    assert all(0.0 <= run["k-NN accuracy"] <= 1.0 for run in results["runs"])
    assert "| clustering | 1 |" in text
    assert (out / "plot.png").is_file()
    status, text, error = dinov3(*words)  # everything is there
    assert status == 0, error
    assert "step" not in text
    status, _, error = dinov3(*words, "steps=4")
    assert status == 2
    assert "steps: 3 there, 4 asked" in error


def test_a_budget_that_ends_within_a_run(dinov3, words, tmp_path):
    status, text, error = dinov3(*words, "minutes=0.0001")
    assert status == 0, error
    assert "raw, seed 0 is not finished; 4 runs are left, the same command goes on" in text
    status, text, error = dinov3(*words)
    assert status == 0, error
    assert "continuing at step 1" in text
    assert "| all | 1 |" in text


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("target=1000", "target=1000"),
        ("stepps=3", "unknown option 'stepps'"),
        ("seeds=0,0", "seeds expects different numbers"),
        ("pool=/absent", "does not exist"),
    ],
)
def test_what_cannot_be(dinov3, words, word, part):
    status, _, error = dinov3(*words, word)
    assert status == 2
    assert part in error
    assert error.count("\n") == 1


def test_the_list_and_a_wrong_name(dinov3):
    assert "data" in dinov3("study")[1]
    status, _, error = dinov3("study", "date", "out=x")
    assert status == 2
    assert "nearest: data" in error
