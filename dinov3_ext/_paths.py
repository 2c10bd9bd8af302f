"""Which code an op runs, and why: `use` forces another path, `explain` answers without running anything."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dinov3_ext import _library

NATIVE, EMULATOR = "dinov3_ext", "dinov3_ext_emulator"  # op namespaces below torch.ops
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


@dataclass(frozen=True)
class Question:
    """What an explainer is asked.

    Args:
        device: a device, present or not.
        dtype: type of the op's main input.
        architecture: of a GPU, e.g. 90 for sm_90; None: not said.
        shape: of the op's main input (see `explain`); None: not said.
    """

    device: torch.device
    dtype: torch.dtype
    architecture: int | None = None
    shape: tuple[int, ...] | None = None


# op -> (explainer, letters of the shape it understands)
_explainers: dict[str, tuple[Callable[[Question], Path], tuple[str, ...]]] = {}


def explains(op: str, *shape: str) -> Callable:
    """Decorator: registers `function(question) -> Path` as what `explain(op)` asks; `shape`: letters of its shape."""

    def register(function: Callable[[Question], Path]) -> Callable:
        _explainers[op] = (function, shape)
        return function

    return register


def explain(
    op: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    architecture: str | None = None,
    shape: tuple[int, ...] | None = None,
) -> Path:
    """Says which path `op` takes, and why; runs nothing, asks no device, needs no GPU.

    Args:
        op: `"rope_attention"`, `"rope_rotate"`, `"gram_loss"`, `"sinkhorn_knopp"` or `"assignment_cross_entropy"`.
        device: a device, present or not: `"cpu"`, `"cuda"`.
        dtype: type of the op's main input.
        architecture: of the GPU, `"sm_80"` to `"sm_120"`; tiles are chosen by it. None: that of the GPU in this
            machine where there is one.
        shape: of the main input: (T, H, E) tokens of a sequence, heads and head width for the two rope ops; (S, N, D)
            for gram_loss; (rows, K) for sinkhorn_knopp; (C, B, K) for assignment_cross_entropy.
    Returns:
        a `Path`; its reason names the kernel and its tile where the question says enough to know them.
    Raises:
        ValueError: unknown op, architecture not of the form sm_NN, shape of another length than the op's.
    """
    if op not in _explainers:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_explainers))}; got {op!r}")
    explainer, letters = _explainers[op]
    match = None if architecture is None else re.fullmatch(r"sm_(\d{2,3})[af]?", architecture)
    if architecture is not None and match is None:
        raise ValueError(f'explain: architecture must be like "sm_90"; got {architecture!r}')
    if shape is not None and (len(shape) != len(letters) or any(size < 0 for size in shape)):
        raise ValueError(f"explain: shape of {op} must be ({', '.join(letters)}), none negative; got {tuple(shape)}")
    if reference_forced():
        return Path(op, "reference", 'forced by `with dinov3_ext.use("reference")`')
    number = int(match.group(1)) if match else _architecture_here(torch.device(device))
    return explainer(Question(torch.device(device), dtype, number, None if shape is None else tuple(shape)))


def _architecture_here(device: torch.device) -> int | None:
    return architecture_of(device) if device.type == "cuda" and torch.cuda.is_available() else None


def architecture_of(device: torch.device) -> int:
    """Of a GPU that is there, e.g. 90; in the emulator what it pretends to be."""
    if emulator_forced():
        return _emulated[-1]()
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def use(path: str) -> Iterator[None]:
    """Forces every op onto another path inside the `with` block.

    Args:
        path: `"reference"`: the plain-PyTorch twin. `"emulator"`: CPU tensors run the CUDA kernels in the emulator; a
            library of its own that only the tests build (tests/emulator).
    Raises:
        ValueError: unknown path.
        RuntimeError: the emulator where its library is not loaded.
    """
    if path not in ("reference", "emulator"):
        raise ValueError(f'use: path must be "reference" or "emulator"; got {path!r}')
    if path == "emulator" and EMULATOR not in _libraries:
        raise RuntimeError('use: "emulator" is not built here: the test suite builds it, an installed package has none')
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


def reference_forced() -> bool:
    """True inside `with use("reference")`."""
    return bool(_forced) and _forced[-1] == "reference"


def emulator_forced() -> bool:
    """True inside `with use("emulator")`: CPU tensors then take the path of CUDA tensors."""
    return bool(_forced) and _forced[-1] == "emulator"


def native_ops() -> object:
    """The registered ops to call: torch.ops.dinov3_ext, or the emulator's."""
    return getattr(torch.ops, EMULATOR if emulator_forced() else NATIVE)


# ---- fakes and backwards, for each library that registers ops ----

_libraries: list[str] = [NATIVE] if _library.module is not None else []
_registrations: list[Callable[[str], None]] = []
_emulated: list[Callable[[], int]] = []  # says which GPU the emulator pretends to be


def for_each_library(register: Callable[[str], None]) -> Callable[[str], None]:
    """Decorator: calls `register(namespace)` for the native library, if there is one, and for the emulator's when it is
    loaded: fakes and backwards of the ops belong to both."""
    _registrations.append(register)
    for namespace in _libraries:
        register(namespace)
    return register


def emulator_loaded(architecture: Callable[[], int]) -> None:
    """To be called once, after the emulator's library has been imported; `architecture` says what GPU it pretends."""
    _emulated.append(architecture)
    if EMULATOR not in _libraries:
        _libraries.append(EMULATOR)
        for register in _registrations:
            register(EMULATOR)
