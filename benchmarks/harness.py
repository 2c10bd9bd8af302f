"""Timing of one thing against others on the same inputs: paired runs, fresh inputs, the machine's own rates beside.

Contenders run in turn within each round, so that a busy machine slows all of them alike; the ratio is the median of the
rounds' ratios. Every call gets inputs that it has not seen.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """One contender's times.

    Args:
        seconds: median over the rounds.
        ratio: median over the rounds of (this contender's time / ours); 1 for ours.
    """

    seconds: float
    ratio: float


def paired(
    contenders: dict[str, Callable[..., object]],
    inputs: Callable[[int], Sequence[object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, Timing]:
    """Times the contenders in turn.

    Args:
        contenders: name -> function of the inputs; the first is ours.
        inputs: `inputs(number)` makes fresh inputs; the number is new for every call, the same for all of a round.
        rounds: timed rounds.
        warmup: rounds before that (compilation, caches).
    Returns:
        name -> `Timing`.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warmup, rounds):
        for name, run in contenders.items():
            arguments = inputs(number)
            elapsed = _timed(run, arguments)
            if number >= 0:
                times[name].append(elapsed)
    ours = next(iter(times.values()))
    return {
        name: Timing(statistics.median(own), statistics.median(t / o for t, o in zip(own, ours)))
        for name, own in times.items()
    }


def _timed(run: Callable[..., object], arguments: Sequence[object]) -> float:
    _wait()
    begin = time.perf_counter()
    run(*arguments)
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_rate(device: str = "cpu", megabytes: int = 128) -> float:
    """Bytes per second of a large copy, read and write counted: what memory gives here and now (best of three)."""
    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.empty_like(source)
    best = min(_timed(target.copy_, [source]) for _ in range(3))
    return 2 * source.numel() * source.element_size() / best


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int = 1024) -> float:
    """FLOP per second of a square product (best of three)."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.matmul(a, b)
    return 2 * size**3 / min(_timed(torch.matmul, [a, b]) for _ in range(3))


def report(title: str, timings: dict[str, Timing], *, moved: int = 0, flops: int = 0) -> str:
    """One paragraph for people: times, ratios, and how near ours is to the machine's rates.

    Args:
        title: op, dtype, shape.
        timings: from `paired`.
        moved: bytes that ours must move at least.
        flops: floating-point operations of ours.
    Returns:
        several lines; also printed.
    """
    lines = [f"{title} [{torch.get_num_threads()} threads, torch {torch.__version__}]"]
    lines += [f"  {name:24s} {t.seconds * 1e3:9.3f} ms  {t.ratio:6.2f} x ours" for name, t in timings.items()]
    ours = next(iter(timings.values())).seconds
    if moved:
        lines.append(f"  ours moves {moved / ours / 1e9:.1f} GB/s; a copy moves {copy_rate() / 1e9:.1f} GB/s")
    if flops:
        rate = matmul_rate(torch.float32)
        lines.append(f"  ours makes {flops / ours / 1e9:.1f} GFLOP/s; an fp32 product makes {rate / 1e9:.1f} GFLOP/s")
    text = "\n".join(lines)
    print("\n" + text)
    return text


def size_in_bytes(*tensors: Tensor) -> int:
    """Bytes of the elements of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
