"""Timing of one op against others on the same inputs: paired runs, fresh inputs, the machine's own rates beside.

Contenders run in turn within each round, so that a busy machine slows all of them alike; the ratio is the median of the
rounds' ratios. Every call gets inputs that it has not seen.
"""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import machine
import torch
from torch import Tensor

import dinov3_ext


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: its name.
        dtype: of the main input.
        shape: for people.
        inputs: `inputs(number, device)` makes fresh inputs; the number is new for every call of a contender.
        contenders: name -> function of the inputs; the first is ours.
        moved: bytes that ours must move at least (read and written).
        flops: floating-point operations of ours.
        eager_moved, compiled_moved: bytes that PyTorch's operations move, one by one and fused by torch.compile:
            counted from the code of the reference; 0: not counted.
        product: type whose product rate bounds `flops`; None: `dtype`.
    """

    op: str
    dtype: torch.dtype
    shape: str
    inputs: Callable[[int, str], Sequence[object]]
    contenders: dict[str, Callable[..., object]]
    moved: int = 0
    flops: int = 0
    eager_moved: int = 0
    compiled_moved: int = 0
    product: torch.dtype | None = None

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Timing:
    """One contender's figures.

    Args:
        seconds: median over the rounds.
        ratio: median over the rounds of (this contender's time / ours); 1 for ours.
        peak: most bytes held beyond the inputs; None: not known.
        state: of the device after the last round.
    """

    seconds: float
    ratio: float
    peak: int | None = None
    state: machine.State = field(default_factory=machine.State)


def paired(
    contenders: dict[str, Callable[..., object]],
    inputs: Callable[[int, str], Sequence[object]],
    *,
    device: str = "cpu",
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, Timing]:
    """Times the contenders in turn.

    Args:
        contenders: name -> function of the inputs; the first is ours.
        inputs: as in `Case`.
        device: where the inputs are made.
        rounds: timed rounds.
        warmup: rounds before that (compilation, caches).
    Returns:
        name -> `Timing`; a contender that runs out of memory is left out.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int | None] = {}
    states: dict[str, machine.State] = {}
    lost: set[str] = set()
    for number in range(-1 - warmup, rounds):
        for name, run in contenders.items():
            if name in lost:
                continue
            call = _Call(run, inputs(number, device))
            machine.flush_cache(device)
            try:
                if number == -1:  # between warm-up and timing: asking for the peak costs time
                    peaks[name] = machine.peak_bytes(call, device)
                    continue
                elapsed = machine.seconds(call, device)
            except torch.OutOfMemoryError:
                lost.add(name)
                continue
            if number >= 0:
                times[name].append(elapsed)
                states[name] = machine.state(device)
    ours = next(iter(times.values()))
    return {
        name: Timing(
            statistics.median(own), statistics.median(t / o for t, o in zip(own, ours)), peaks[name], states[name]
        )
        for name, own in times.items()
        if name not in lost
    }


@dataclass(frozen=True)
class _Call:
    """A function with its inputs."""

    run: Callable[..., object]
    arguments: Sequence[object]

    def __call__(self) -> None:
        self.run(*self.arguments)


def measure(case: Case, *, device: str, rounds: int, results: Path | None = None, command: str = "") -> str:
    """Times a case, prints and returns the report, and appends one row per contender to `results`."""
    timings = paired(case.contenders, case.inputs, device=device, rounds=rounds)
    text = report(case, timings, device)
    print("\n" + text)
    if results is not None:
        append_rows(results, case, timings, device, command)
    return text


def report(case: Case, timings: dict[str, Timing], device: str) -> str:
    """One paragraph for people: times, ratios, memory, and how near ours is to the machine's rates."""
    where = dinov3_ext.explain(case.op, device=device, dtype=case.dtype)
    lines = [f"{case.title} [{machine.name(device)}, torch {torch.__version__}; ours: {where.path}]"]
    for name, t in timings.items():
        peak = "" if t.peak is None else f"  peak + {t.peak / 1e6:9.1f} MB"
        lines.append(f"  {name:28s} {t.seconds * 1e3:10.3f} ms  {t.ratio:6.2f} x ours{peak}")
    ours = next(iter(timings.values()))
    if case.moved:
        rate, most = case.moved / ours.seconds, machine.copy_rate(device)
        lines.append(f"  ours moves {rate / 1e9:.1f} GB/s, {rate / most:.0%} of what a copy moves ({most / 1e9:.1f})")
    if case.flops:
        kind = case.product or case.dtype
        rate, most = case.flops / ours.seconds, machine.product_rate(kind, device)
        lines.append(
            f"  ours makes {rate / 1e12:.3f} TFLOP/s, {rate / most:.0%} of what a {kind} product makes "
            f"({most / 1e12:.3f})"
        )
    if ours.state.clock is not None:
        s = ours.state
        lines.append(f"  {s.clock} MHz, {s.power if s.power is not None else '?'} W, {s.temperature} degrees Celsius")
    return "\n".join(lines)


COLUMNS = (
    "time", "commit", "device", "dtype", "op", "shape", "path", "contender", "seconds", "ratio", "peak_bytes",
    "bytes", "gbyte_per_s", "share_of_copy", "flops", "tflop_per_s", "share_of_product",
    "clock_mhz", "power_w", "temperature_c", "torch", "command",
)  # fmt: skip


def append_rows(results: Path, case: Case, timings: dict[str, Timing], device: str, command: str) -> None:
    """One row per contender; rates for ours only, whose bytes and FLOPs are counted."""
    new = not results.is_file()
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        if new:
            writer.writeheader()
        for number, (name, t) in enumerate(timings.items()):
            row = {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": machine.commit(),
                "device": machine.name(device), "dtype": str(case.dtype).removeprefix("torch."), "op": case.op,
                "shape": case.shape, "contender": name, "seconds": f"{t.seconds:.6g}", "ratio": f"{t.ratio:.4g}",
                "peak_bytes": t.peak, "clock_mhz": t.state.clock, "power_w": t.state.power,
                "temperature_c": t.state.temperature, "torch": torch.__version__, "command": command,
            }  # fmt: skip
            if number == 0:
                row["path"] = dinov3_ext.explain(case.op, device=device, dtype=case.dtype).path
                if case.moved:
                    rate = case.moved / t.seconds
                    row |= {"bytes": case.moved, "gbyte_per_s": f"{rate / 1e9:.4g}"}
                    row["share_of_copy"] = f"{rate / machine.copy_rate(device):.3f}"
                if case.flops:
                    rate = case.flops / t.seconds
                    row |= {"flops": case.flops, "tflop_per_s": f"{rate / 1e12:.4g}"}
                    row["share_of_product"] = f"{rate / machine.product_rate(case.product or case.dtype, device):.3f}"
            writer.writerow(row)


def trained(function: Callable[..., Tensor]) -> Callable[..., None]:
    """`function` with its backward pass, from the sum of what it returns."""
    return lambda *inputs: function(*inputs).sum().backward()


def size_in_bytes(*tensors: Tensor) -> int:
    """Bytes of the elements of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
