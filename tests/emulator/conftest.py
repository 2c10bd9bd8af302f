"""The tests of the emulator draw the same numbers in every run. Its fixtures are in tests/conftest.py."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)
