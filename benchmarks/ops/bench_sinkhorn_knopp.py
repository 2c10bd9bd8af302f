"""sinkhorn_knopp against DINO's naive form, the log-domain reference, and torch.compile of the latter.

Bytes: the logits once for the column sums and once per round, (1 + iterations) reads.
"""

import pytest
import torch
from harness import paired, report, size_in_bytes
from torch import Tensor

from dinov3_ext import sinkhorn_knopp, sinkhorn_knopp_reference

T = 0.07
SMALL = [(128, 8192), (512, 4096)]
FULL = [(128, 65536), (512, 65536), (32, 262144)]  # DINO ViT-L, iBOT of 512 patches, DINO 7B on one rank


def naive(logits: Tensor) -> Tensor:
    """The textbook loop, in fp32; overflows beyond logits / temperature of 88."""
    q = (logits.float() / T).exp().t()
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).t()


def log_domain(logits: Tensor) -> object:
    return sinkhorn_knopp_reference(logits, temperature=T)


def ours(logits: Tensor) -> object:
    return sinkhorn_knopp(logits, temperature=T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("index", range(3))
def test_sinkhorn_knopp(full: bool, dtype: torch.dtype, index: int, benchmark) -> None:
    shapes = FULL if full else SMALL
    if index >= len(shapes):
        pytest.skip("fewer shapes without --full")
    rows, prototypes = shapes[index]

    def inputs(number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number + 1000)
        return [torch.randn(rows, prototypes, generator=generator).to(dtype)]

    contenders = {"ours": ours, "eager, DINO's form": naive, "eager, log domain": log_domain}
    if full:
        contenders["torch.compile, DINO's form"] = torch.compile(naive, fullgraph=True)
        contenders["torch.compile, log domain"] = torch.compile(log_domain, fullgraph=True)
    timings = paired(contenders, inputs, rounds=5 if full else 3)
    moved = 4 * size_in_bytes(*inputs(0))
    benchmark.extra_info["report"] = report(f"sinkhorn_knopp {rows} x {prototypes} {dtype}", timings, moved=moved)
    numbers = iter(range(10_000, 20_000))
    benchmark.pedantic(ours, setup=lambda: (inputs(next(numbers)), {}), rounds=3)
