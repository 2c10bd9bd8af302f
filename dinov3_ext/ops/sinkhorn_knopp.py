"""Sinkhorn-Knopp balancing of teacher logits: every image sums to one, every prototype gets its share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3_ext import _library
from dinov3_ext._paths import Path, Question, explains, for_each_library, native_ops, reference_forced
from dinov3_ext.collectives import ALONE, Collectives

KERNEL_DEVICES = ("cpu", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Potentials:
    """The balanced assignment in factors: p[b, k] = exp(logits[b, k] / temperature + rows[b] + columns[k]).

    Args:
        rows: (rows,) natural logarithms, fp32 (fp64 for fp64 logits).
        columns: (K,) natural logarithms, the same on every rank.
    """

    rows: Tensor
    columns: Tensor


def sinkhorn_knopp(
    logits: Tensor, *, temperature: float, iterations: int = 3, collectives: Collectives = ALONE
) -> Potentials:
    """Potentials of the balanced assignment of samples to prototypes.

    columns[k] = -log sum_b exp(logits[b, k] / temperature + rows[b])   over the samples of all ranks
    rows[b]    = -log sum_k exp(logits[b, k] / temperature + columns[k])
    from rows = 0, `iterations` times: rows sum to one exactly, columns nearly to the same number. Everything stays in
    logarithms, so that logits of any size stay finite. No gradient.

    Args:
        logits: (rows, K) fp32, bf16, fp16 or fp64; rows may be strided, and may be none on some ranks.
        temperature: > 0.
        iterations: >= 1.
        collectives: exchanges over the ranks that share the prototypes.
    Returns:
        `Potentials`.
    Raises:
        ValueError: wrong shape, type, temperature or iterations.
        ImportError: the native library is not built (fp32, bf16 and fp16 on a CPU or CUDA device need it).
    Source:
        Cuturi 2013; SwAV (arXiv 2006.09882) for the use here.
    """
    _check_inputs("sinkhorn_knopp", logits, temperature, iterations)
    if reference_forced() or not _has_kernel(logits.device, logits.dtype):
        return sinkhorn_knopp_reference(logits, temperature=temperature, iterations=iterations, collectives=collectives)
    _library.require("sinkhorn_knopp")
    return _sinkhorn_knopp(logits.detach(), temperature, iterations, collectives)


def _sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int, collectives: Collectives) -> Potentials:
    """The kernels; several ranks exchange between them: one maximum and `iterations` sums of K numbers each."""
    rows, prototypes = logits.shape
    if (prototypes > 1 and logits.stride(1) != 1) or (rows > 1 and logits.stride(0) < prototypes):
        logits = logits.contiguous()
    ops = native_ops()
    if collectives.world_size == 1:
        return Potentials(*ops.sinkhorn_potentials(logits, temperature, iterations))
    maxima, sums = ops.sinkhorn_column_sums(logits, temperature)  # (K,) each
    largest = collectives.all_reduce(maxima.clone(), "max")
    # A rank without rows has (-inf, 0); -inf - -inf would be NaN.
    sums = torch.where(maxima == -torch.inf, 0.0, sums * (maxima - largest).exp())
    columns, potentials = -largest, logits.new_zeros(rows, dtype=torch.float32)
    for iteration in range(iterations):
        columns = ops.sinkhorn_finish(collectives.all_reduce(sums, "sum"), columns)
        potentials, sums = ops.sinkhorn_row_sums(logits, potentials, columns, temperature, iteration + 1 < iterations)
    return Potentials(potentials, columns)


def sinkhorn_knopp_reference(
    logits: Tensor, *, temperature: float, iterations: int = 3, collectives: Collectives = ALONE
) -> Potentials:
    """The plain twin of `sinkhorn_knopp`: logarithms of sums of exponentials, in fp32 or (fp64 logits) fp64."""
    _check_inputs("sinkhorn_knopp", logits, temperature, iterations)
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    scores = logits.detach().to(wide) / temperature  # (rows, K)
    rows = scores.new_zeros(scores.shape[0])
    columns = scores.new_zeros(scores.shape[1])
    for _ in range(iterations):
        shifted = scores + rows[:, None]
        lowest = shifted.new_full((1, shifted.shape[1]), -torch.inf)
        largest = collectives.all_reduce(torch.cat([shifted, lowest]).amax(0), "max")  # (K,)
        shift = torch.where(largest == -torch.inf, 0.0, largest)  # a column without any row stays at zero
        sums = collectives.all_reduce((shifted - shift).exp().sum(0), "sum")  # (K,)
        columns = torch.where(sums == 0, 0.0, -(shift + sums.log()))
        rows = -torch.logsumexp(scores + columns, 1)
    return Potentials(rows, columns)


def assignment(logits: Tensor, potentials: Potentials, *, temperature: float) -> Tensor:
    """The assignment matrix itself, for those who want to look at it; losses read the potentials.

    p[b, k] = exp(logits[b, k] / temperature + rows[b] + columns[k])

    Args:
        logits: (rows, K), the logits of `sinkhorn_knopp`.
        potentials: its result.
        temperature: its temperature.
    Returns:
        (rows, K) probabilities in the type of the potentials; each row sums to one.
    Raises:
        ValueError: shapes that do not belong together, temperature not > 0.
    """
    _check_inputs("assignment", logits, temperature, 1)
    if potentials.rows.shape != logits.shape[:1] or potentials.columns.shape != logits.shape[1:]:
        raise ValueError(
            f"assignment: potentials must be rows ({logits.shape[0]},) and columns ({logits.shape[1]},); "
            f"got {tuple(potentials.rows.shape)} and {tuple(potentials.columns.shape)}"
        )
    scores = logits.to(potentials.columns.dtype) / temperature
    return (scores + potentials.rows[:, None] + potentials.columns).exp()


def _check_inputs(op: str, logits: Tensor, temperature: float, iterations: int) -> None:
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"{op}: logits must be (rows, K) with K >= 1; got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"{op}: logits must be floating point; got {logits.dtype}")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be > 0; got {temperature}")
    if iterations < 1:
        raise ValueError(f"{op}: iterations must be >= 1; got {iterations}")


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type in KERNEL_DEVICES and dtype in KERNEL_DTYPES


@explains("sinkhorn_knopp", "rows", "K")
def _explain(question: Question) -> Path:
    device, dtype = question.device, question.dtype
    if not _has_kernel(device, dtype):
        return Path("sinkhorn_knopp", "reference", f"no kernel for {dtype} on {device.type}")
    if _library.module is None:
        return Path("sinkhorn_knopp", "missing", _library.problem)
    info = _library.build_info()
    if device.type == "cpu":
        return Path("sinkhorn_knopp", "kernel", f"own CPU kernel, {info['cpu_variant']}")
    if info["cuda"] is None:
        return Path("sinkhorn_knopp", "missing", "the library was built without nvcc: no CUDA kernels")
    reason = f"own CUDA kernels, built for {info['cuda_architectures']}"
    if question.shape is None or question.shape[1] < 1:
        return Path("sinkhorn_knopp", "kernel", reason)
    plan = _library.module.sinkhorn_knopp_plan(str(dtype).removeprefix("torch."), *question.shape)
    memory = "kept in shared memory" if plan["kept"] else "read twice"
    return Path(
        "sinkhorn_knopp",
        "kernel",
        f"{reason}; one rank alone: {plan['tiles']} tiles of {plan['columns']} columns and all rows an iteration, "
        f"{memory}, {plan['shared_bytes'] / 1024:.0f} KB a block; several ranks: rows in {plan['splits']} splits, "
        f"columns in {plan['ranges']} ranges; on every architecture",
    )


@for_each_library
def _register(namespace: str) -> None:
    fake = torch.library.register_fake

    @fake(f"{namespace}::sinkhorn_potentials")
    def _(logits: Tensor, temperature: float, iterations: int) -> tuple[Tensor, Tensor]:
        return (
            logits.new_empty(logits.shape[0], dtype=torch.float32),
            logits.new_empty(logits.shape[1], dtype=torch.float32),
        )

    @fake(f"{namespace}::sinkhorn_column_sums")
    def _(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return (
            logits.new_empty(logits.shape[1], dtype=torch.float32),
            logits.new_empty(logits.shape[1], dtype=torch.float32),
        )

    @fake(f"{namespace}::sinkhorn_finish")
    def _(sums: Tensor, shift: Tensor) -> Tensor:
        return torch.empty_like(sums)

    @fake(f"{namespace}::sinkhorn_row_sums")
    def _(
        logits: Tensor, previous: Tensor, columns: Tensor, temperature: float, column_sums: bool
    ) -> tuple[Tensor, Tensor]:
        return (
            logits.new_empty(logits.shape[0], dtype=torch.float32),
            logits.new_empty(logits.shape[1] if column_sums else 0, dtype=torch.float32),
        )
