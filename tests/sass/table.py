"""Prints what the compiler made of each kernel: registers, shared memory, spills, occupancy, instruction counts.

    python tests/sass/table.py [--architecture 90]... [--csv FILE]

Static counts: each instruction of the machine code once, however often it runs. No GPU is needed, none is measured.
"""

import argparse
import csv
from pathlib import Path

import compiled
import launches
from occupancy import Block, blocks_per_multiprocessor

COUNTED = {
    "HMMA": "HMMA",
    "LDSM": "LDSM",
    "LDGSTS": "LDGSTS",
    "LDG.128": r"LDG\..*128",
    "STG.128": r"STG\..*128",
    "EX2": r"MUFU\.EX2",
    "CALL": "CALL",
}
COLUMNS = ("kernel", "arch", "threads", "registers", "shared", "spills", "blocks/SM", "warps/SM", "code", *COUNTED)


def rows(architecture: int) -> list[tuple]:
    """One per kernel and shared memory it is launched with."""
    starts: dict[str, set[tuple[int, int]]] = {}
    for launch in launches.all_launches(architecture):
        starts.setdefault(launch.symbol, set()).add((launch.threads, launch.shared))
    found = []
    for kernel in compiled.all_kernels(architecture):
        counts = [kernel.count(pattern) for pattern in COUNTED.values()]
        code = sum(i.opcode != "NOP" for i in kernel.instructions)
        for threads, shared in sorted(starts.get(kernel.symbol, {(0, 0)})):
            block = Block(architecture, threads, kernel.registers, kernel.static_shared, shared)
            blocks = blocks_per_multiprocessor([block])[0] if threads else 0
            found.append(
                (
                    f"{kernel.op}: {kernel.name}", f"sm_{architecture}", threads or "-", kernel.registers,
                    kernel.static_shared + shared, kernel.spill_stores + kernel.spill_loads,
                    blocks if threads else "-", blocks * block.warps if threads else "-", code, *counts,
                )
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, action="append", choices=compiled.ARCHITECTURES)
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args()
    table = [row for number in chosen.architecture or compiled.ARCHITECTURES for row in rows(number)]
    widths = [max(len(str(row[column])) for row in [COLUMNS, *table]) for column in range(len(COLUMNS))]
    for row in [COLUMNS, *table]:
        print("  ".join(str(x).ljust(w) if i == 0 else str(x).rjust(w) for i, (x, w) in enumerate(zip(row, widths))))
    if chosen.csv:
        with chosen.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])


if __name__ == "__main__":
    if problem := compiled.missing_tool():
        raise SystemExit(f"table: {problem}")
    main()
