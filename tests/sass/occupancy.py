"""How many blocks and warps of a kernel one multiprocessor holds (occupancy.cpp, the toolkit's calculator)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import compiled

SOURCE = Path(__file__).with_name("occupancy.cpp")


@dataclass(frozen=True)
class Block:
    """What decides it.

    Args:
        architecture: 80, 90, 120.
        threads: of the block.
        registers: of a thread.
        static_shared, dynamic_shared: bytes of the block.
    """

    architecture: int
    threads: int
    registers: int
    static_shared: int
    dynamic_shared: int

    @property
    def warps(self) -> int:
        return -(-self.threads // 32)


def blocks_per_multiprocessor(blocks: Sequence[Block]) -> list[int]:
    """For each: how many run at once on one multiprocessor; 0: it cannot run there."""
    lines = "\n".join(
        f"{b.architecture} {b.threads} {b.registers} {b.static_shared} {b.dynamic_shared}" for b in blocks
    )
    answers = [int(line) for line in compiled.run([_program()], input=lines + "\n").split()]
    assert len(answers) == len(blocks), "the occupancy program did not answer every line"
    assert min(answers, default=0) >= 0, f"cuda_occupancy.h refused a line with error {-min(answers)}"
    return answers


def _program() -> Path:
    def build(folder: Path) -> None:
        steps = compiled.run(["nvcc", "--dryrun", "-x", "cu", "/dev/null"])
        toolkit = Path(re.search(r"_HERE_=(\S+)", steps).group(1)).parent
        compiled.run(["g++", "-std=c++20", "-O1", f"-I{toolkit / 'include'}", SOURCE, "-o", folder / "occupancy"])

    return compiled.keep_in_cache("occupancy", compiled.digest([SOURCE]), build) / "occupancy"
