"""Files that are whole or absent: written under a temporary name, renamed when complete, so that a stage can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The temporary path to write to; it takes the name `path` when the block ends without an error.

    Errors: OSError, one line that names the file and says that finished work is kept, when it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"curate: cannot write {path} ({reason}); what was finished before is kept, the same command goes on"
        ) from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder itself is gone or read-only: the error above says so already
        pass


def write_json(path: Path, values: Mapping) -> None:
    """A JSON object, whole or absent."""
    text = json.dumps(values, indent=1) + "\n"
    with whole(path) as partial:
        partial.write_text(text)


def read_json(path: Path) -> dict:
    """The object that `write_json` wrote. Errors: ValueError for a file that is damaged or holds something else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"curate: {path} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"curate: {path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file, whole or absent."""
    with whole(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def read_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """An array of a .npy file, memory-mapped if asked. Errors: ValueError for a missing or damaged one."""
    try:
        # "c": pages stay the file's as long as nobody writes, and torch takes such an array without a warning
        return np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"curate: {path} is missing, cut or damaged ({' '.join(str(error).split())})") from error


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Several arrays in one .npz file, whole or absent."""
    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays that `write_arrays` wrote. Errors: ValueError for a file that is cut or damaged."""
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"curate: {path} is missing, cut or damaged ({' '.join(str(error).split())})") from error


def claim(folder: Path, settings: Mapping, stage: str) -> None:
    """Write `settings` into a new folder, or check that the folder was made with the very same ones.

    Errors: ValueError naming the settings that differ, or for a folder that holds something else.
    """
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if path.is_file():
        found = read_json(path)
        differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        if differing:
            said = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in differing[:3])
            raise ValueError(f"{stage}: out={folder} was made with other settings ({said}); expected a new folder")
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{stage}: out: expected a folder, got the file {folder}")
    if folder.is_dir() and any(not entry.name.endswith(".partial") for entry in folder.iterdir()):
        raise ValueError(f"{stage}: out={folder} is not empty and was not made by this command; expected a new folder")
    write_json(path, wanted)
