"""Benchmarks are bench_*.py: `pytest benchmarks` runs small shapes on a CPU and those of the recipes on a GPU."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of dinov3_ext")
    group.addoption("--full", action="store_true", help="on a CPU: larger shapes, more rounds, torch.compile")
    group.addoption("--threads", type=int, default=1, help="CPU threads of torch")
    group.addoption("--device", help="where to run (default: the GPU if there is one, else the CPU)")
    group.addoption(
        "--seconds", type=float, help="leave out what does not begin in time; torch.compile after half of it"
    )
    group.addoption("--results", type=Path, help="CSV file to which one row per contender is appended")


def pytest_configure(config: pytest.Config) -> None:
    """One thread unless asked: on a busy machine two threads wait for each other more than they work."""
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A bench file's `cases(level)` gives the tests of its function with an argument `case`."""
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    level = "recipe" if device_of(config) != "cpu" else "full" if config.getoption("--full") else "small"
    found = metafunc.module.cases(level)
    metafunc.parametrize("case", found, ids=[case.title.replace(" ", "-") for case in found])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With a time limit the first shape of every op comes first."""
    if config.getoption("--seconds"):
        seen: dict[str, int] = {}
        turn = {}
        for item in items:
            turn[item] = seen[item.path.stem] = seen.get(item.path.stem, -1) + 1
        items.sort(key=turn.get)


def device_of(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark):
    """bench(case): measures it, prints the report, and gives ours to pytest-benchmark too."""
    import harness
    import machine

    config = request.config
    device = device_of(config)
    large = device != "cpu" or config.getoption("--full")

    def run(case) -> None:
        used = (time.monotonic() - BEGIN) / (config.getoption("--seconds") or float("inf"))
        if used > 1:
            pytest.skip("no time left for this shape")
        compiled = large and used < 0.5
        contenders = {k: v for k, v in case.contenders.items() if compiled or "compile" not in k}
        case = replace(case, contenders=contenders)
        command = "pytest " + " ".join(config.invocation_params.args)
        benchmark.extra_info["report"] = harness.measure(
            case, device=device, rounds=7 if large else 3, results=config.getoption("--results"), command=command
        )
        numbers = iter(range(10_000, 20_000))
        ours = next(iter(contenders.values()))

        def called(*inputs: object) -> None:
            ours(*inputs)
            machine.wait(device)

        benchmark.pedantic(called, setup=lambda: (case.inputs(next(numbers), device), {}), rounds=3)

    return run
