"""Benchmarks are bench_*.py: `pytest benchmarks` runs small shapes, `--full` those of the recipes."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="benchmarks: shapes of the recipes, more rounds, torch.compile"
    )
    parser.addoption("--threads", type=int, default=1, help="benchmarks: CPU threads of torch")


def pytest_configure(config: pytest.Config) -> None:
    """One thread unless asked: on a busy machine two threads wait for each other more than they work."""
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the large shapes were asked for."""
    return request.config.getoption("--full")
