"""The CUDA kernels in the emulator, and the CPU kernels, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.build import build, missing_tools

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("address", "undefined")
# What runs: the emulator's own mistakes, allowed patterns, words and counters, and the mutants of every op.
SELECTION = [
    *("tests/emulator/test_emulator_races.py", "tests/emulator/test_emulator_words.py"),
    *("tests/emulator/test_emulator_counters.py", "tests/emulator/test_emulator_products.py"),
    "tests/emulator/test_mutants.py",
]
PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow")
PROBE = """
import torch
from emulator.build import load
load()
print(torch.ops.dinov3_ext_probes.unsound(torch.ones(32), {which}).sum())
"""


def run(sanitizer: str, *arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Python with the sanitizer's library in front."""
    compiler = os.environ.get("CXX", "g++")
    wanted = ["libasan.so" if sanitizer == "address" else "libubsan.so", "libstdc++.so"]
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in wanted
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(path.strip() for path in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # leaks: CPython's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "python"), str(ROOT / "tests")]),
        "PYTHONSAFEPATH": "1",
        **variables,
    }
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run_emulated(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess:
    return run(sanitizer, *arguments, DINOV3_EMULATOR=str(build(sanitizer)))


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    missing = missing_tools()
    if missing and "CI" not in os.environ:
        pytest.skip(f"the emulator's build needs {', '.join(missing)}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_report(sanitizer: str) -> None:
    done = run_emulated(sanitizer, *PYTEST, *SELECTION)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("sanitizer", "which", "report"),
    [("address", 1, "stack-buffer-overflow"), ("undefined", 2, "signed integer overflow")],
)
def test_the_sanitizers_are_at_work(sanitizer: str, which: int, report: str) -> None:
    """A read behind a local array and a signed overflow: the emulator alone sees neither."""
    assert run_emulated(sanitizer, "-c", PROBE.format(which=0)).returncode == 0
    done = run_emulated(sanitizer, "-c", PROBE.format(which=which))
    assert done.returncode != 0
    assert report in done.stderr
    assert "probe_kernels.cpp" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_report_of_the_cpu_kernels(sanitizer: str, tmp_path: Path) -> None:
    """The ops' own tests on a package whose shipped library is sanitized."""
    library = build(sanitizer, target="_C")
    assert b"__asan_init" in library.read_bytes() if sanitizer == "address" else b"__ubsan" in library.read_bytes()
    shutil.copytree(ROOT / "dinov3_ext", tmp_path / "dinov3_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(library, tmp_path / "dinov3_ext")
    loaded = run(sanitizer, "-c", "import dinov3_ext; print(dinov3_ext.build_info()['library'])", folder=tmp_path)
    assert loaded.stdout.strip() == str(tmp_path / "dinov3_ext" / library.name), loaded.stderr
    done = run(sanitizer, *PYTEST, str(ROOT / "tests" / "ops"), folder=tmp_path)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
