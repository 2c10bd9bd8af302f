"""The emulator and the kernels in it under AddressSanitizer and UndefinedBehaviorSanitizer, each in its own process."""

import os
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
PROBE = """
import torch
from emulator.build import load
load()
print(torch.ops.dinov3_ext_probes.unsound(torch.ones(32), {which}).sum())
"""


def run(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess:
    """Python with the sanitizer's library in front and the sanitized emulator."""
    compiler = os.environ.get("CXX", "g++")
    wanted = ["libasan.so" if sanitizer == "address" else "libubsan.so", "libstdc++.so"]
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in wanted
    ]
    environment = {
        **os.environ,
        "DINOV3_EMULATOR": str(build(sanitizer)),
        "LD_PRELOAD": " ".join(path.strip() for path in libraries),
        # Leaks: CPython's own. Reports of NumPy and torch are none of ours and there are none so far.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]),
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    missing = missing_tools()
    if missing and "CI" not in os.environ:
        pytest.skip(f"the emulator's build needs {', '.join(missing)}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_report(sanitizer: str) -> None:
    done = run(sanitizer, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *SELECTION)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("sanitizer", "which", "report"),
    [("address", 1, "heap-buffer-overflow"), ("undefined", 2, "signed integer overflow")],
)
def test_the_sanitizers_are_at_work(sanitizer: str, which: int, report: str) -> None:
    """A read behind a tensor by a plain pointer and a signed overflow: the emulator alone sees neither."""
    assert run(sanitizer, "-c", PROBE.format(which=0)).returncode == 0
    done = run(sanitizer, "-c", PROBE.format(which=which))
    assert done.returncode != 0
    assert report in done.stderr
    assert "probe_kernels.cpp" in done.stderr
