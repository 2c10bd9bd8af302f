"""What every test shares: one thread, the marker of slow tests, and the place of the real photographs."""

import os
from pathlib import Path

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
