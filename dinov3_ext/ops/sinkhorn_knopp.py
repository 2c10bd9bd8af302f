"""Sinkhorn-Knopp balancing of teacher logits: every image sums to one, every prototype gets its share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3_ext.collectives import ALONE, Collectives


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
    Source:
        Cuturi 2013; SwAV (arXiv 2006.09882) for the use here.
    """
    return sinkhorn_knopp_reference(logits, temperature=temperature, iterations=iterations, collectives=collectives)


@torch.no_grad()
def sinkhorn_knopp_reference(
    logits: Tensor, *, temperature: float, iterations: int = 3, collectives: Collectives = ALONE
) -> Potentials:
    """The plain twin of `sinkhorn_knopp`: logarithms of sums of exponentials, in fp32 or (fp64 logits) fp64."""
    _check_inputs("sinkhorn_knopp", logits, temperature, iterations)
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    scores = logits.to(wide) / temperature  # (rows, K)
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
