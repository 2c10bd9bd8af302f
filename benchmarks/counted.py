"""What the CUDA kernels move and multiply, counted where no GPU is: nothing here is a measured time.

    python benchmarks/counted.py [--op NAME] [--csv FILE]

The emulator (csrc/emulator) runs the kernels and counts: distinct 32-byte sectors of global memory per launch, the
bytes the threads asked for, tensor-core products, special functions, bank conflicts. Shapes are those of the recipes,
with fewer images, heads or prototypes where the emulator would be slow; counts are then multiplied by the factor that
is printed. Floors: for each kernel the larger of bytes / bandwidth and FLOPs / peak, added up over the kernels, which
run one after another. Eager and compiled: bytes of PyTorch's operations, counted from the reference's code (the
derivations stand in benchmarks/ops/bench_*.py), over the same bandwidth.
"""

import argparse
import csv
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "ops"), str(ROOT / "tests"), str(ROOT)]

import torch  # noqa: E402

import dinov3_ext  # noqa: E402

OPS = ("rope_attention", "gram_loss", "sinkhorn_knopp", "assignment_cross_entropy")
SECTOR = 32
PRODUCT = 2 * 16 * 8 * 16  # FLOPs of one mma.m16n8k16


@dataclass(frozen=True)
class Device:
    """Data-sheet rates: bytes per second, dense 16-bit FLOP per second with fp32 sums."""

    name: str
    bandwidth: float
    peak: float


DEVICES = (
    Device("H100 SXM", 3.35e12, 989e12),
    Device("A100 SXM", 2.0e12, 312e12),
    Device("4090", 1.008e12, 165e12),
)


@dataclass(frozen=True)
class Count:
    """Sums over all launches of one kernel.

    Args:
        kernel: its name.
        sectors: bytes of the distinct sectors read and written.
        requested: bytes that the threads asked for.
        flops: of the tensor cores.
        counters: everything the emulator counted.
    """

    kernel: str
    sectors: int
    requested: int
    flops: int
    counters: dict[str, int]

    def floor(self, device: Device, factor: float) -> float:
        return factor * max(self.sectors / device.bandwidth, self.flops / device.peak)


def count(emulator, case) -> list[Count]:
    """Runs a case in the emulator."""
    emulator.configure()
    emulator.reset_counters()
    inputs = case.inputs(0, "cpu")
    with dinov3_ext.use("emulator"):
        next(iter(case.contenders.values()))(*inputs)
    found = []
    for kernel, c in sorted(emulator.counters().items()):
        sectors = SECTOR * (c["global_read_sectors"] + c["global_written_sectors"])
        requested = c["global_read_bytes"] + c["global_written_bytes"]
        found.append(Count(kernel, sectors, requested, PRODUCT * c["mma"], c))
    return found


COLUMNS = (
    "op", "dtype", "shape", "counted_at", "factor", "kernel", "launches", "sector_bytes", "requested_bytes",
    "mma_flops", "ldmatrix", "exp2", "shuffles", "bank_conflicts", "commit", "how",
)  # fmt: skip


def rows(case, small, factor: float, counts: list[Count], commit: str) -> list[dict]:
    """One per kernel, not multiplied."""
    return [
        {
            "op": case.op, "dtype": str(case.dtype).removeprefix("torch."), "shape": case.shape,
            "counted_at": small.shape, "factor": factor, "kernel": c.kernel, "launches": c.counters["launches"],
            "sector_bytes": c.sectors, "requested_bytes": c.requested, "mma_flops": c.flops,
            **{name: c.counters[name] for name in ("ldmatrix", "exp2", "shuffles", "bank_conflicts")},
            "commit": commit, "how": "counted in the emulator, not measured",
        }
        for c in counts
    ]  # fmt: skip


def report(case, small, factor: float, counts: list[Count]) -> str:
    scaled = "" if factor == 1 else f", counted at {small.shape} and multiplied by {factor:g}"
    lines = [f"{case.title}{scaled}  [counted, not measured]"]
    lines.append(
        f"  {'kernel':34s}{'launches':>9s}{'MB sectors':>12s}{'MB asked':>11s}{'GFLOP mma':>11s}{'ldmatrix':>10s}"
        f"{'exp2':>11s}{'shuffles':>10s}{'conflicts':>10s}"
    )
    for c in counts:
        n = c.counters
        lines.append(
            f"  {c.kernel:34.34s}{n['launches']:9d}{factor * c.sectors / 1e6:12.1f}{factor * c.requested / 1e6:11.1f}"
            f"{factor * c.flops / 1e9:11.2f}{n['ldmatrix']:10d}{n['exp2']:11d}{n['shuffles']:10d}"
            f"{n['bank_conflicts']:10d}"
        )
    moved, flops = factor * sum(c.sectors for c in counts), factor * sum(c.flops for c in counts)
    if case.flops and not flops:
        lines.append(
            f"  ours moves {moved / 1e6:.1f} MB here; the products are PyTorch's at this shape and not counted"
        )
        return "\n".join(lines)
    least = f", {moved / case.moved:.3f} of the least possible {case.moved / 1e6:.1f}" if case.moved else ""
    lines.append(f"  ours moves {moved / 1e6:.1f} MB{least}")
    if case.flops:
        lines.append(f"  ours makes {flops / 1e9:.1f} GFLOP in products, {flops / case.flops:.3f} of the useful ones")
    if case.eager_moved:
        lines.append(
            f"  eager moves {case.eager_moved / 1e6:.1f} MB ({case.eager_moved / moved:.1f} x ours), compiled "
            f"{case.compiled_moved / 1e6:.1f} MB ({case.compiled_moved / moved:.1f} x ours)"
        )
    for device in DEVICES:
        floor = sum(c.floor(device, factor) for c in counts)
        others = f"eager {case.eager_moved / device.bandwidth * 1e6:8.1f}, compiled " + (
            f"{case.compiled_moved / device.bandwidth * 1e6:8.1f}"
        )
        lines.append(f"  floor on {device.name:9s}{floor * 1e6:10.1f} us; bytes alone: {others} us")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--csv", type=Path, help="one row per kernel")
    parser.add_argument("--quick", action="store_true", help="the first shape of each op")
    chosen = parser.parse_args()
    import machine
    from emulator.build import load

    emulator, table = load(), []
    torch.set_num_threads(1)
    for op in chosen.op or OPS:
        pairs = importlib.import_module(f"bench_{op}").counted()
        for small, factor, case in pairs[:1] if chosen.quick else pairs:
            begin = time.monotonic()
            counts = count(emulator, small)
            if not counts:
                print(f"{case.title}: no kernel of this op ran in the emulator\n")
                continue
            print(report(case, small, factor, counts))
            print(f"  (the emulator took {time.monotonic() - begin:.1f} s)\n", flush=True)
            table += rows(case, small, factor, counts, machine.commit())
    if chosen.csv:
        with chosen.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
