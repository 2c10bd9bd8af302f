"""Builds the emulator's library on first use and loads it: `from emulator.build import load; emulator = load()`.

    python -m tests.emulator.build        builds it and says where it lies

Then `with dinov3_ext.use("emulator"):` runs the CUDA kernels on CPU tensors. The build is incremental (cmake and ninja,
build/emulator) and guarded by a file lock, so that several test processes do not collide.
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
MODULE = "_emulator"


def missing_tools() -> list[str]:
    """What the build needs and this machine lacks."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if compiler):
        missing.append("a C++ compiler")
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    return missing


def build(sanitize: str = "", target: str = MODULE) -> Path:
    """Builds what has changed; returns the library's file.

    Args:
        sanitize: "", "address" or "undefined": a build of its own in build/emulator-<sanitize>.
        target: "_emulator", or "_C": the shipped library without CUDA, to be sanitized.
    Raises:
        RuntimeError: with the compiler's output.
    """
    folder = ROOT / "build" / (f"emulator-{sanitize}" if sanitize else "emulator")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DDINOV3_EXT_CUDA=off"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DDINOV3_EXT_SANITIZE={sanitize}"]
        cache = folder / "CMakeCache.txt"
        # Another interpreter has other headers and another torch: configured anew.
        known = (folder / "build.ninja").is_file() and f"={sys.executable}\n" in cache.read_text()
        commands = [] if known else [[*configure, "--fresh"] if cache.is_file() else configure]
        for command in [*commands, ["ninja", "-C", str(folder), target]]:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-20000:]}")
    return folder / (target + sysconfig.get_config_var("EXT_SUFFIX"))


def load() -> ModuleType:
    """Builds and loads the emulator, once per process; `dinov3_ext.use("emulator")` works from then on."""
    if MODULE not in sys.modules:
        file = Path(os.environ["DINOV3_EMULATOR"]) if "DINOV3_EMULATOR" in os.environ else build()
        from dinov3_ext import _paths  # after the build: it imports torch, which the library needs in the process

        spec = importlib.util.spec_from_file_location(MODULE, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[MODULE] = module
        _paths.emulator_loaded(module.architecture)
    return sys.modules[MODULE]


if __name__ == "__main__":
    print(build())
