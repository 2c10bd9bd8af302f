"""Which code an op runs, and why: `use` forces the reference twin, `explain` answers without running anything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_forced: list[str] = []


@dataclass(frozen=True)
class Path:
    """One answer of `explain`.

    Args:
        op: name of the op.
        path: `"kernel"` (this package's native code), `"composition"` (PyTorch operations arranged for speed),
            `"reference"` (the plain twin), or `"missing"` (native code that should run here, but is not built).
        reason: one sentence.
    """

    op: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


_explainers: dict[str, Callable[[torch.device, torch.dtype], Path]] = {}


def explains(op: str) -> Callable:
    """Decorator: registers `function(device, dtype) -> Path` as what `explain(op)` asks."""

    def register(function: Callable[[torch.device, torch.dtype], Path]) -> Callable:
        _explainers[op] = function
        return function

    return register


def explain(op: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Path:
    """Says which path `op` takes for tensors of `dtype` on `device`, and why; runs nothing, asks no device.

    Args:
        op: `"rope_attention"`, `"rope_rotate"`, `"gram_loss"`, `"sinkhorn_knopp"` or `"assignment_cross_entropy"`.
        device: a device, present or not: `"cpu"`, `"cuda"`.
        dtype: type of the op's main input.
    Returns:
        a `Path`.
    Raises:
        ValueError: unknown op.
    """
    if op not in _explainers:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_explainers))}; got {op!r}")
    if _forced:
        return Path(op, "reference", 'forced by `with dinov3_ext.use("reference")`')
    return _explainers[op](torch.device(device), dtype)


@contextmanager
def use(path: str) -> Iterator[None]:
    """Forces every op onto another path inside the `with` block.

    Args:
        path: `"reference"`: the plain-PyTorch twin. `"emulator"`: the CUDA kernels run on the CPU; a library of its
            own that only the tests build.
    Raises:
        ValueError: unknown path.
        RuntimeError: the emulator, which no installed package holds.
    """
    if path == "emulator":
        raise RuntimeError('use: "emulator" is not built here: the test suite builds it, an installed package has none')
    if path != "reference":
        raise ValueError(f'use: path must be "reference" or "emulator"; got {path!r}')
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


def reference_forced() -> bool:
    """True inside `with use("reference")`."""
    return bool(_forced)
