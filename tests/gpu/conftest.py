"""Tests that need a GPU: skipped, with the reason, where there is none. `pytest tests/gpu --device cpu` tries the tests
themselves on the CPU kernels (what needs streams is then skipped)."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="of the tests in tests/gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = config.getoption("--device", "cuda") == "cuda" and not torch.cuda.is_available()
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if absent:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device", "cuda")


@pytest.fixture
def gpu(device: str) -> str:
    """The device, where the test is about streams and graphs."""
    if device == "cpu":
        pytest.skip("streams and graphs are a GPU's")
    return device
