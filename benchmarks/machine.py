"""What the machine gives here and now: its own copy and product rates, its memory, and (on a GPU) clock, power and
temperature. A benchmark prints its figures as shares of these."""

import ctypes
import functools
import importlib.util
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def wait(device: str) -> None:
    """Returns when the device has finished all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    """How long `run()` takes, from an idle device to an idle device.

    On a GPU: events around it; a pause in front keeps the GPU waiting until all launches are queued, so that short
    kernels are timed and not their launching. On a CPU with one thread: processor time, which a busy machine does not
    stretch; with more threads: wall time.
    """
    wait(device)
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # clock cycles: about a millisecond
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


@functools.cache
def copy_rate(device: str = "cpu") -> float:
    """Bytes per second of a large copy, read and write counted (best of five)."""
    source = torch.ones(2**28 if device.startswith("cuda") else 2**25, device=device)  # fp32: 1 GiB, 128 MiB
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() * source.element_size() / best


@functools.cache
def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP per second of a large square product in `dtype`, as PyTorch is set (best of five)."""
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.matmul(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.matmul(a, b), device) for _ in range(5))


@functools.cache
def _flusher(device: str) -> torch.Tensor:
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 128 << 20
    return torch.empty(2 * cache, dtype=torch.uint8, device=device)


def flush_cache(device: str) -> None:
    """Leaves nothing of earlier inputs in a GPU's L2 cache. On a CPU fresh inputs do that."""
    if device.startswith("cuda"):
        _flusher(device).fill_(1)


# ---- memory ----


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Most memory that `run()` holds beyond what is there before it; None where nothing can tell.

    GPU: PyTorch's allocator. CPU: growth of the process's peak resident memory (Linux).
    """
    wait(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed counts again when it is used again
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        run()
        return None
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


# ---- state of the device ----


@dataclass(frozen=True)
class State:
    """A GPU's state right after a measurement; None for what cannot be asked.

    Args:
        clock: MHz of the multiprocessors.
        power: W.
        temperature: degrees Celsius.
    """

    clock: int | None = None
    power: float | None = None
    temperature: int | None = None


def state(device: str) -> State:
    """Through nvidia-ml-py (extra `benchmark`)."""
    if not device.startswith("cuda") or importlib.util.find_spec("pynvml") is None:
        return State()
    import pynvml

    pynvml.nvmlInit()
    identifier = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(identifier)
    return State(
        _asked(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        _asked(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
        _asked(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    )


def _asked(question: Callable[[], object]) -> object:
    import pynvml

    try:
        return question()
    except pynvml.NVMLError:  # virtual GPUs do not tell everything
        return None


@functools.cache
def name(device: str) -> str:
    """The device, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str:
    """Of this working copy, with + where it has changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
