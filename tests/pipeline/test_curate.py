"""`dinov3 curate ...` on a run of the tiny recipe: every command, the chain, restarts, ranks, mistakes in one line."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from dinov3_train.data.manifest import manifest_settings, read_manifest


@pytest.fixture(scope="module")
def run(recipe_file, tmp_path_factory, image_folder):
    """A run of the tiny recipe, two steps long."""
    from dinov3_train.build import pretrain
    from dinov3_train.config import override
    from dinov3_train.recipes import recipe

    out = tmp_path_factory.mktemp("run") / "run"
    pretrain(override(recipe(str(recipe_file)), [f"data.sources=['{image_folder}']", "run.steps=2"]), out)
    return out


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """pool: 36 images of three kinds, six of them copied, of which two re-encoded; seeds: 3; held: 2 of the pool."""
    root = tmp_path_factory.mktemp("photographs")
    for name in ("pool", "seeds", "held"):
        (root / name).mkdir()
    for number in range(41):
        rng = np.random.default_rng(number)
        kind = number % 3
        base = np.random.default_rng(1000 + kind).integers(0, 255, (4, 4, 3)) * 0.5 + rng.integers(0, 128, (4, 4, 3))
        picture = Image.fromarray(base.astype(np.uint8)).resize((44, 40), Image.Resampling.BICUBIC)
        folder = "pool" if number < 36 else "seeds" if number < 39 else "held"
        picture.save(root / folder / f"{number:02d}.png")
    for number in range(4):
        shutil.copy(root / "pool" / f"{number:02d}.png", root / "pool" / f"{number:02d}copy.png")
    for number in (4, 5):
        Image.open(root / "pool" / f"{number:02d}.png").save(root / "pool" / f"{number:02d}encoded.jpg", quality=90)
    for number in (6, 7):
        shutil.copy(root / "pool" / f"{number:02d}.png", root / "held" / f"{number:02d}.png")
    return root


def words(run, photographs, out, *more):
    return [
        "curate", "run", f"pool={photographs / 'pool'}", f"seeds={photographs / 'seeds'}",
        f"held_out={photographs / 'held'}", f"backbone={run}", "target=20", f"out={out}", "clusters=6,2",
        "iterations=3", "resampling=1", "shard=8", "threshold=0.995", "pooling=patch_mean", *more,
    ]  # fmt: skip


def call(given: list[str]) -> tuple[int, str, str]:
    """The command line in this process: exit status, standard output, standard error."""
    from dinov3_train.cli import main

    before, said, error = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["dinov3", *map(str, given)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
            main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = before
    return status, said.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def whole(run, photographs, tmp_path_factory):
    """The chain run through: its folder and what it said."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, said, error = call(words(run, photographs, out))
    assert (status, error) == (0, "")
    return out, said


def test_the_chain_writes_a_manifest_without_duplicates_or_leaks(whole, photographs):
    out, said = whole
    rows = read_manifest(out / "manifest.parquet").to_pylist()
    parts = [row["part"] for row in rows]
    assert parts.count("seeds") == 3
    assert parts.count("clustering") + parts.count("retrieval") == 20
    assert 1 <= parts.count("retrieval") <= 10
    names = [row["name"].rsplit("/", 1)[-1].split(".")[0] for row in rows]
    origins = [name[:2] for name in names]
    assert len(set(origins)) == len(origins)
    assert not {"06", "07"} & set(origins)  # they are held out
    for row in rows:
        assert (len(row["cluster_path"]) == 2) == (row["part"] in ("clustering", "retrieval"))
        assert bool(row["retrieval_seed"]) == (row["part"] == "retrieval")
        assert (row["width"], row["height"]) == (44, 40)
        assert row["source"] == str(photographs / ("seeds" if row["part"] == "seeds" else "pool"))
    settings = manifest_settings(out / "manifest.parquet")
    assert settings["target"] == 20
    assert settings["counts"]["leaks"] >= 2
    assert f"wrote {out / 'manifest.parquet'}" in said


def test_the_same_line_again_makes_nothing_anew(whole, run, photographs, dinov3):
    out, _ = whole
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    status, said, error = dinov3(*words(run, photographs, out))
    assert (status, error) == (0, "")
    assert "iteration" not in said
    changed = {path.name for path, time in files.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"manifest.parquet", "summary.json"}


@pytest.mark.parametrize(
    "lost",
    [
        ("embeddings/pool/shard_000002.parquet", "duplicates", "clusters", "retrieved", "manifest.parquet"),
        ("duplicates/summary.json", "clusters/level_2_labels.npy", "manifest.parquet"),
        ("clusters/level_1_labels.npy", "clusters/level_2_labels.npy", "retrieved/seeds.npz", "manifest.parquet"),
    ],
)
def test_whatever_a_kill_leaves_is_completed(whole, run, photographs, dinov3, tmp_path, lost):
    """A folder without some of its last files is what a kill leaves: the same manifest comes of it."""
    shutil.copytree(whole[0], tmp_path / "out")
    for name in lost:
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "out" / "embeddings" / "pool" / ".shard_000002.npy.partial").write_bytes(b"half")
    status, _, error = dinov3(*words(run, photographs, tmp_path / "out"))
    assert (status, error) == (0, "")
    found, expected = (read_manifest(place / "manifest.parquet") for place in (tmp_path / "out", whole[0]))
    assert found.equals(expected)


def test_two_ranks_write_the_same_manifest(whole, run, photographs, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "dinov3_train.cli", *words(run, photographs, tmp_path / "out")],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = (read_manifest(place / "manifest.parquet") for place in (tmp_path / "out", whole[0]))
    assert found.equals(expected)


def test_commands_one_by_one(run, photographs, dinov3, tmp_path):
    counts = {"pool": 42, "seeds": 3, "held": 4}
    for name in counts:
        status, said, error = dinov3(
            "curate",
            "embed",
            f"backbone={run}",
            f"data={photographs / name}",
            f"out={tmp_path / name}",
            "shard=16",
            "pooling=patch_mean",
        )
        assert (status, error) == (0, "")
        assert f"{counts[name]} x 32 in" in said
    status, said, _ = dinov3(
        "curate", "dedup", f"data={tmp_path / 'pool'}", f"held_out={tmp_path / 'held'}", f"out={tmp_path / 'd'}",
        "threshold=0.995",
    )  # fmt: skip
    assert status == 0
    assert "46 images, " in said
    keep, clusters = f"keep={tmp_path / 'd'}", f"clusters={tmp_path / 'c'}"
    assert dinov3(
        "curate", "cluster", f"data={tmp_path / 'pool'}", keep, "clusters=5", f"out={tmp_path / 'c'}", "iterations=2"
    )[0] == 0  # fmt: skip
    out = tmp_path / "s.parquet"
    assert dinov3("curate", "sample", f"data={tmp_path / 'pool'}", keep, clusters, "target=9", f"out={out}")[0] == 0
    assert parquet.read_table(out).num_rows == 9
    assert set(read_manifest(out, ["part"])["part"].to_pylist()) == {"clustering"}
    assert dinov3("curate", "sample", f"data={tmp_path / 'pool'}", "target=9", f"out={out}")[0] == 0
    assert set(read_manifest(out, ["part"])["part"].to_pylist()) == {"raw"}
    for more in ((), (clusters,)):
        status, said, error = dinov3(
            "curate", "retrieve", f"data={tmp_path / 'pool'}", keep, f"seeds={tmp_path / 'seeds'}", f"out={out}", *more
        )
        assert (status, error) == (0, "")
        seeds = set(read_manifest(out, ["retrieval_seed"])["retrieval_seed"].to_pylist())
        assert seeds <= {str(photographs / "seeds" / f"{n}.png") for n in (36, 37, 38)}
        assert seeds
    status, _, error = dinov3("curate", "sample", f"data={tmp_path / 'pool'}", clusters, "target=9", f"out={out}")
    assert status == 2
    assert "clustered images, data and keep have 42" in error


def test_mistakes_are_one_line(run, photographs, dinov3, tmp_path):
    pool, out = photographs / "pool", tmp_path / "out"
    cases = [
        (("embed", f"data={pool}", f"out={out}"), "curate embed: missing backbone="),
        (("embed", f"backbone={run}", f"data={pool}", f"out={out}", "pooling=max"), "pooling expects one of"),
        (("embed", f"backbone={run}", f"data={pool}", f"out={out}", "size=33"), "33"),
        (("cluster", f"data={tmp_path / 'no'}", "clusters=3", f"out={out}"), "expected a folder of embeddings"),
        (("cluster", f"data={pool}", "clusters=a,b", f"out={out}"), "clusters expects K1,K2"),
        (("dedup", f"data={pool}", "treshold=0.9", f"out={out}"), "unknown option 'treshold'; nearest: threshold"),
        (("run", f"pool={pool}", f"backbone={run}", f"out={out}", "target=0"), "target expects at least 1 image"),
        (("run", f"pool={pool}", f"backbone={run}", f"out={out}", "target=5", "method=best"), "method expects one of"),
        (("run", f"pool={pool}", f"backbone={run}", f"out={out}", "target=500", "threshold=1"), "target=500 images"),
    ]  # fmt: skip
    for given, text in cases:
        status, _, error = dinov3("curate", *given)
        assert status == 2, given
        assert text in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_disk_that_is_full_is_one_line_and_the_same_command_goes_on(whole, run, photographs, tmp_path):
    """The system writes no more than 1,500 bytes of a file, then gives room: nothing lost, the manifest the same."""
    import resource

    given = words(run, photographs, tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        status, _, error = call(given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1, error
    assert error.startswith("dinov3: error: curate: cannot write")
    assert error.endswith("the same command goes on\n")
    assert not list((tmp_path / "out").rglob("*.partial"))
    status, _, error = call(given)
    assert (status, error) == (0, "")
    assert read_manifest(tmp_path / "out" / "manifest.parquet").equals(read_manifest(whole[0] / "manifest.parquet"))
