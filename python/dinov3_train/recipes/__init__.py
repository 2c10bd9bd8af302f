"""Recipes: one Python file per experiment, holding one function of the file's name that returns a `Config`.

`dinov3 pretrain recipe=NAME` looks here; `recipe=PATH.py` takes a file of one's own, written the same way.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

from ..config import Config


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def recipe(name: str) -> Config:
    """The config of a recipe by name, or by the path of a Python file.

    Errors: ValueError naming the nearest recipes, or what the file lacks.
    """
    module = _module(name)
    function = getattr(module, module.__name__.rsplit(".", 1)[-1], None)
    config = function() if callable(function) else None
    if not isinstance(config, Config):
        raise ValueError(f"recipe: {name} must hold a function {Path(module.__file__).stem}() that returns a Config")
    return config


def summary(name: str) -> str:
    """The first line of a recipe's header."""
    return (_module(name).__doc__ or "").strip().splitlines()[0]


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"recipe: expected a Python file, got {name!r}, which does not exist")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=3, cutoff=0.3) or names()
        raise ValueError(f"recipe: no recipe named {name!r}; nearest: {', '.join(close)} (dinov3 recipes lists all)")
    return importlib.import_module(f"{__name__}.{name}")
