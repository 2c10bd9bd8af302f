"""Builds the native library: setuptools calls CMake and ninja, and CMakeLists.txt says what is built.

DINOV3_EXT_CUDA=auto|on|off    CUDA kernels where nvcc is found (default), always, never
DINOV3_EXT_ARCHS="80;90"       CUDA architectures (default: the GPU in this machine, else a list)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, builds and copies `_C` to where setuptools wants it (beside the package in an editable install)."""

    def build_extension(self, extension: Extension) -> None:
        cmake, ninja = (shutil.which(tool) for tool in ("cmake", "ninja"))
        if not cmake or not ninja:
            raise SystemExit("dinov3-ext: the build needs cmake and ninja on PATH (pip brings them when it isolates)")
        # Kept between builds: kernels see no path of the build environment and are only compiled when they change.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            *(cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDINOV3_EXT_VERSION={self.distribution.get_version()}",
            f"-DDINOV3_EXT_CUDA={os.environ.get('DINOV3_EXT_CUDA', 'auto')}",
            f"-DDINOV3_EXT_ARCHS={os.environ.get('DINOV3_EXT_ARCHS', '')}",
        ]
        configured = subprocess.run(configure, check=False, stdout=subprocess.PIPE, text=True)
        facts = configured.stdout
        if configured.returncode or subprocess.run([ninja, "-C", str(folder)], check=False).returncode:
            raise SystemExit(f"{facts}\ndinov3-ext: the native build failed; the messages above say where")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".new")
        shutil.copy2(folder / self.get_ext_filename("_C"), temporary)
        temporary.replace(target)  # never over a library that a running process has mapped
        print("\n".join(line.removeprefix("-- ") for line in facts.splitlines() if "dinov3_ext:" in line))


setup(ext_modules=[Extension("dinov3_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
