"""What every test shares: one thread, the marker of slow tests, and the place of the real photographs."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """One thread per process: tiny tensors gain nothing from more, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs: DINOV3_DATA, or shared/data beside the repository; skips where there is none."""
    folder = Path(os.environ.get("DINOV3_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the photographs in {folder}; DINOV3_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def emulator_library() -> ModuleType:
    """The emulator, built on first use; skips where a tool for that is missing (but fails in .ci, where CI is set)."""
    from emulator.build import load, missing_tools

    missing = missing_tools()
    if missing and "CI" not in os.environ:
        pytest.skip(f"the emulator's build needs {', '.join(missing)}")
    return load()


@pytest.fixture
def emulator(emulator_library: ModuleType) -> Iterator[ModuleType]:
    """The emulator as it comes and with zero counters, for one test: `with dinov3_ext.use("emulator"): ...`."""
    emulator_library.configure()
    emulator_library.mutate(None)
    emulator_library.reset_counters()
    yield emulator_library
    emulator_library.configure()
    emulator_library.mutate(None)
