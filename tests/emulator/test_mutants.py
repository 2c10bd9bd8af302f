"""Every barrier and every wait of the kernels is needed: without it the emulator reports a hazard or results change.

The calls are numbered by where they stand (file:line:column). A covering set of small shapes says which calls are
reached; then one call at a time does nothing (a copy_async_wait: also, waits for one group fewer), and some case must
end in a report or in other bits. Kernels are deterministic, so other bits are wrong bits.
"""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulator.covering_set import CASES, Case

import dinov3_ext

ROOT = Path(__file__).resolve().parents[2]
WORD = re.compile(r"\b(block_barrier|warp_barrier|copy_async_wait<[^;]*>)\(")
# Architectures whose launchers choose other tiles: 227, 163 and 99 KB of shared memory.
ARCHITECTURES = (90, 80, 120)
# What the emulator is set to, one after another, until a mutant is caught.
SETTINGS = ({}, {"cp_async": "now"}, {"seed": 1}, {"seed": 2, "cp_async": "now"})
# Mutants that no run can tell from the kernel, each with its reason: site without columns -> reason.
EQUIVALENT: dict[str, str] = {}


def run(case: Case) -> list[torch.Tensor]:
    with dinov3_ext.use("emulator"):
        return case()


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)) for a, b in zip(one, other, strict=True))


def calls_in_sources(folder: Path) -> dict[str, str]:
    """{"file:line": word} of every barrier and wait written in the kernels of a folder."""
    found = {}
    for path in sorted(folder.glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            match = WORD.search(line.split("//")[0])
            if match:
                found[f"{path.relative_to(ROOT).as_posix()}:{number}"] = match.group(1)
    return found


def caught(emulator: ModuleType, site: str, kernel: str, short_wait: bool, runs: list) -> bool:
    """Whether any of `runs`, (case, architecture, expected), notices that the call at `site` is gone."""
    emulator.mutate(site, kernel=kernel, short_wait=short_wait)
    try:
        for case, architecture, expected in runs:
            for settings in SETTINGS:
                emulator.configure(architecture=architecture, **settings)
                try:
                    if not same(run(case), expected):
                        return True
                except RuntimeError:
                    assert emulator.last_report()
                    return True
        return False
    finally:
        emulator.mutate(None)


@pytest.mark.parametrize("op", CASES)
def test_every_barrier_and_wait_is_needed(emulator: ModuleType, op: str) -> None:
    reached: dict[tuple[str, str, str], list] = {}  # (site, word, family of kernels) -> runs that reach it
    for architecture in ARCHITECTURES:
        emulator.configure(architecture=architecture)
        for case in CASES[op].values():
            emulator.reset_counters()
            expected = run(case)
            assert not any(x.isnan().any() for x in expected)
            for one in emulator.sites():
                for kernel in {name.split("<")[0] for name in one["kernels"]}:
                    runs = reached.setdefault((one["site"], one["word"], kernel), [])
                    runs.append((case, architecture, expected))

    written = calls_in_sources(ROOT / "csrc" / "ops" / op)
    lines = {site.rsplit(":", 1)[0] for site, _, _ in reached}
    assert not set(written) - lines, "the covering set (covering_set.py) does not reach these calls"
    unneeded = [
        f"{site} in {kernel}: " + ("waits for one group fewer" if short_wait else f"no {word}")
        for (site, word, kernel), runs in reached.items()
        for short_wait in ((False, True) if word == "copy_async_wait" else (False,))
        # What stands in csrc/core serves many kernels and is needed by some: the probes have it.
        if not site.startswith("csrc/core") and site.rsplit(":", 1)[0] not in EQUIVALENT
        if not caught(emulator, site, kernel, short_wait, runs)
    ]
    assert not unneeded, "mutants that nothing notices:\n" + "\n".join(unneeded)


@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("op", CASES)
def test_random_schedules_change_nothing(emulator: ModuleType, op: str, seed: int) -> None:
    """Random orders of threads and blocks, copies that arrive late or at once: no hazard, the same bits."""
    cases = list(CASES[op].values())
    case = cases[seed % len(cases)]
    architecture = ARCHITECTURES[seed % 3]
    emulator.configure(architecture=architecture)
    expected = run(case)
    emulator.configure(
        seed=seed, cp_async=("late", "now")[seed // 3 % 2], threads=1 + seed // 2 % 3, architecture=architecture
    )
    assert same(run(case), expected)


PROBES = {
    "rotate": lambda: [torch.ops.dinov3_ext_probes.rotate(torch.arange(192.0).view(3, 64))],
    "pipeline": lambda: [torch.ops.dinov3_ext_probes.pipeline(torch.arange(6 * 256.0).view(6, 256))],
    "reduce": lambda: [torch.ops.dinov3_ext_probes.reduce(torch.arange(600.0).view(2, 300))],
}


@pytest.mark.parametrize("probe", PROBES)
def test_mutants_of_the_probes_are_caught(emulator: ModuleType, probe: str) -> None:
    """Kernels of which every barrier is known to be needed: the method itself finds all of them."""
    expected = PROBES[probe]()
    sites = emulator.sites()
    assert len(sites) == {"rotate": 4, "pipeline": 2, "reduce": 2}[probe]
    for one in sites:
        for short_wait in (False, True) if one["word"] == "copy_async_wait" else (False,):
            emulator.mutate(one["site"], short_wait=short_wait)
            with pytest.raises(RuntimeError, match="race in|under way"):
                PROBES[probe]()
            emulator.mutate(None)
            assert same(PROBES[probe](), expected)


def test_the_probes_reach_what_the_core_calls(emulator: ModuleType) -> None:
    for probe in PROBES.values():
        probe()
    written = calls_in_sources(ROOT / "csrc" / "core")
    written = {place for place in written if "primitives.cuh" not in place}
    assert written
    assert not written - {one["site"].rsplit(":", 1)[0] for one in emulator.sites()}


def test_an_unneeded_barrier_survives(emulator: ModuleType) -> None:
    """The method tells needed from unneeded: a barrier between a thread's own accesses can go."""

    def run_22() -> None:
        torch.ops.dinov3_ext_probes.faulty(torch.zeros(128), torch.zeros(128), 22)

    run_22()
    (site,) = emulator.sites()
    assert site["word"] == "block_barrier"
    emulator.mutate(site["site"])
    run_22()
    assert emulator.counters()["faulty_kernel"]["block_barriers"] == 2  # of the first run, its two blocks
