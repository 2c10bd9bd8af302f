"""Finds and loads the native library `dinov3_ext._C`.

Beside this file (a regular or an editable install), else the one of the installed distribution: in the repository root
the source folder comes first on the path and must not hide it. A library built from other sources than those that lie
beside this package is named in a warning.
"""

import importlib.metadata
import importlib.util
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch  # before the library, which needs torch's own libraries in the process

from dinov3_ext._digest import source_digest

MODULE = "dinov3_ext._C"
FOLDER = Path(__file__).resolve().parent


def find() -> Path | None:
    """File of the native library, or None."""
    names = ["_C" + suffix for suffix in EXTENSION_SUFFIXES]
    for name in names:
        if (FOLDER / name).is_file():
            return FOLDER / name
    for distribution in importlib.metadata.distributions(name="dinov3-ext"):
        for name in names:
            path = Path(distribution.locate_file(f"dinov3_ext/{name}"))
            if path.is_file():
                return path
    return None


def _load() -> tuple[ModuleType | None, str]:
    """(module, "") or (None, what is wrong)."""
    path = find()
    if path is None:
        return (
            None,
            f"no native library beside {FOLDER} and none installed; `pip install .` in the repository builds it",
        )
    spec = importlib.util.spec_from_file_location(MODULE, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"{path} does not load beside torch {torch.__version__}: {error}"
    sys.modules[MODULE] = module
    stale = stale_text(module.build_info()["source_digest"], FOLDER.parent, path)
    if stale:
        warnings.warn(stale, RuntimeWarning, stacklevel=2)
    return module, ""


def stale_text(built_from: str, root: Path, path: Path) -> str:
    """What to say when the library at `path` was not built from the sources under `root`; "" where it was."""
    sources = source_digest(root)
    if sources in ("", built_from):
        return ""
    return (
        f"dinov3_ext: stale native library {path}: built from sources {built_from}, but {root} holds {sources}; "
        "`pip install .` there builds it anew"
    )


module, problem = _load()


def require(op: str) -> None:
    """Raises where `op` needs the native library and there is none.

    Raises:
        ImportError: naming what is missing and what to do.
    """
    if module is None:
        raise ImportError(
            f'{op}: {problem}; or take the plain-PyTorch twin: with dinov3_ext.use("reference")', name=MODULE
        )


def build_info() -> dict:
    """What was built and is loaded.

    Returns:
        dict with `library` (file, or None), `problem` (why there is none, or ""), `version`, `source_digest`, `stale`,
        `torch_headers`, `torch`, `compiler`, `cpu_variant`, `cuda` (version of the CUDA runtime built in, e.g. 13000,
        or None), `cuda_architectures`. Without a library only the first two, `torch` and `cuda` are there.
    """
    if module is None:
        return {"library": None, "problem": problem, "torch": torch.__version__, "cuda": None}
    info = module.build_info()
    return {
        "library": module.__file__,
        "problem": "",
        **info,
        "stale": bool(stale_text(info["source_digest"], FOLDER.parent, Path(module.__file__))),
        "torch": torch.__version__,
        "cpu_variant": module.cpu_variant(),
    }
