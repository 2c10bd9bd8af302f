"""The torch-free driver of the launchers: on the emulator it runs and passes; with nvcc's kernels it builds."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.usefixtures("emulator_library")  # builds the emulator's folder and the kernels in it
def test_every_launcher_is_as_good_as_the_cpu_kernels_on_the_emulator() -> None:
    folder = ROOT / "build" / "emulator"
    run("ninja", "-C", folder, "emulated_driver")
    lines = run(folder / "emulated_driver").splitlines()
    assert lines[-1].startswith("0 of "), "\n".join(lines)
    for op in ("rope_attention", "rope_rotate", "gram_loss", "sinkhorn_knopp", "assignment_cross_entropy"):
        assert any(line.startswith("ok") and f" {op} " in line for line in lines), f"no case of {op}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_with_nvcc_it_builds() -> None:
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # setup.py's, with the kernels in it
    if not (folder / "build.ninja").is_file():
        options = ["-DDINOV3_EXT_CUDA=on", "-DDINOV3_EXT_ARCHS=90", f"-DPython_EXECUTABLE={sys.executable}"]
        run("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options)
    run("ninja", "-C", folder, "driver")
    assert (folder / "driver").is_file()
