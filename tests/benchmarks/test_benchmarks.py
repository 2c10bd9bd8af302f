"""What the scripts in benchmarks/ promise on a machine without a GPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object, seconds: int = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_run_all_says_in_one_line_that_there_is_no_gpu() -> None:
    done = run("benchmarks/gpu/run_all.py")
    assert done.returncode == 1
    assert len(done.stdout.strip().splitlines()) == 1
    assert "no GPU" in done.stdout


def test_a_benchmark_reports_and_appends_rows(tmp_path: Path) -> None:
    results = tmp_path / "rows.csv"
    chosen = ["benchmarks", "-q", "-s", "-k", "gram_loss and 100", "--device", "cpu", "--results", results]
    done = run("-m", "pytest", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x ours" in done.stdout
    assert "of what a copy moves" in done.stdout
    rows = list(csv.DictReader(results.open()))
    assert [row["contender"] for row in rows] == ["ours", "eager"]
    for row in rows:
        assert all(row[name] for name in ("device", "dtype", "shape", "commit", "command", "seconds", "torch"))
    assert 0 < float(rows[0]["share_of_copy"]) < 1.5
    assert float(rows[0]["ratio"]) == 1
    assert float(rows[1]["ratio"]) > 0


def test_a_benchmark_without_time_is_left_out(tmp_path: Path) -> None:
    chosen = ["benchmarks", "-q", "-k", "gram_loss and 100", "--device", "cpu", "--seconds", "0.001"]
    done = run("-m", "pytest", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout


@pytest.mark.usefixtures("emulator_library")
def test_counted_says_that_it_is_counted(tmp_path: Path) -> None:
    table = tmp_path / "counted.csv"
    done = run("benchmarks/counted.py", "--op", "gram_loss", "--quick", "--csv", table)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "counted, not measured" in done.stdout
    rows = list(csv.DictReader(table.open()))
    assert {row["how"] for row in rows} == {"counted in the emulator, not measured"}
    products = {row["kernel"]: int(row["mma_flops"]) for row in rows}
    # The lower triangle of two matrices of 256 patches, width 1024, tiles of 128: three of four tiles, times three
    # products of the two halves of an fp32 number.
    assert sum(n for kernel, n in products.items() if "tiles" in kernel) == 3 * 2 * 3 * 2 * 128 * 128 * 1024
    assert all(int(row["bank_conflicts"]) == 0 for row in rows if int(row["mma_flops"]))
