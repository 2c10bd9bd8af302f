"""The rules themselves: each offender is found, the innocent is not, and loops are recognised."""

import re
from pathlib import Path

import compiled
import launches
import pytest
import rules
from control_flow import read_instructions

OFFENDERS = Path(__file__).with_name("offenders.cu")
pytestmark = pytest.mark.skipif(compiled.missing_tool() is not None, reason=str(compiled.missing_tool()))

EXPECTED = {
    "spills": "spills [1-9]",
    "local_array": "local memory",
    "divides": "calls inside a loop",
    "adds_atomically": "atomics",
    "guards": "guards of exp2",
    "doubles": "double precision",
    "loads_two_matrices": "matrix loads",
    "copies_four_bytes": "asynchronous copies",
}


@pytest.fixture(scope="module")
def offenders() -> dict[str, compiled.Kernel]:
    return {kernel.name: kernel for kernel in compiled.kernels_of(OFFENDERS, 90)}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_offender_is_found(name: str, offenders: dict) -> None:
    found = list(rules.machine_code(offenders[name]))
    assert any(re.search(EXPECTED[name], sentence) for sentence in found), found


def test_a_kernel_that_keeps_the_rules_is_not(offenders: dict) -> None:
    kernel = offenders["keeps_the_rules"]
    assert list(rules.machine_code(kernel)) == []
    assert kernel.count("CALL") == 1, "the division outside the loop"
    assert kernel.count("FFMA", loops_only=True) == 1 < kernel.count("FFMA")


def test_only_what_is_not_launched_may_spill(offenders: dict) -> None:
    assert list(rules.machine_code(offenders["spills"]))
    assert list(rules.machine_code(offenders["spills"], launched=False)) == []


def test_every_offender_is_named(offenders: dict) -> None:
    assert offenders.keys() == {*EXPECTED, "keeps_the_rules"}


def test_launch_bounds_are_read(offenders: dict) -> None:
    assert offenders["spills"].threads == 1024 == offenders["divides"].threads
    assert all(kernel.threads == 256 for kernel in compiled.all_kernels(90) if kernel.name.startswith("column_"))


def test_every_instruction_is_read() -> None:
    text = compiled.compile_cubin(OFFENDERS, 90).with_suffix(".sass").read_text()
    assert sum(len(body) for body in read_instructions(text).values()) == len(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/ ", text, re.MULTILINE)
    )


@pytest.mark.parametrize(
    ("threads", "shared", "sentence"),
    [(64, 200 * 1024, "fewer than 8 warps"), (2048, 0, "__launch_bounds__ 1024"), (256, 228 * 1024, "bytes of shared")],
)
def test_a_launch_that_does_not_fit_is_found(threads: int, shared: int, sentence: str, offenders: dict) -> None:
    kernel = offenders["keeps_the_rules"]
    launch = launches.Launch("case", kernel.symbol, (1, 1, 1), (threads, 1, 1), shared, b"", {})
    assert any(sentence in found for found in rules.fits([launch], [kernel], 90))
    good = launches.Launch("case", kernel.symbol, (1, 1, 1), (256, 1, 1), 0, b"", {})
    assert list(rules.fits([good], [kernel], 90)) == []
    unknown = launches.Launch("case", "unknown", (1, 1, 1), (256, 1, 1), 0, b"", {})
    assert any("no cubin" in found for found in rules.fits([unknown], [kernel], 90))
