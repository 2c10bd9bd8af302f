"""sinkhorn_knopp against DINO's naive form, the log-domain reference, and torch.compile of both.

Bytes of ours: a round reads the logits once, three reads (one rank alone; ranks that exchange take six on a GPU, four
on a CPU).
"""

import torch
from harness import Case
from torch import Tensor

from dinov3_ext import sinkhorn_knopp, sinkhorn_knopp_reference

T = 0.07
SHAPES = {
    "small": [(128, 8192), (512, 4096)],
    "full": [(128, 65536), (512, 65536), (32, 262144)],  # DINO ViT-L, iBOT of 512 patches, DINO 7B on one rank
    "recipe": [(128, 65536), (4915, 65536), (32, 262144), (1229, 98304)],  # DINO and iBOT of ViT-L (64) and 7B (16)
}


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


def cases(level: str) -> list[Case]:
    contenders = {
        "ours": ours,
        "eager, DINO's form": naive,
        "eager, log domain": log_domain,
        "torch.compile, DINO's form": torch.compile(naive, fullgraph=True),
        "torch.compile, log domain": torch.compile(log_domain, fullgraph=True),
    }
    dtypes = [torch.bfloat16] if level == "recipe" else [torch.bfloat16, torch.float32]
    return [case(rows, prototypes, dtype, level, contenders) for rows, prototypes in SHAPES[level] for dtype in dtypes]


def counted() -> list[tuple[Case, float, Case]]:
    """For counted.py: (case for the emulator, factor, case of a recipe): fewer prototypes."""

    def at(rows: int, prototypes: int) -> Case:
        return case(rows, prototypes, torch.bfloat16, "recipe", {"ours": ours})

    return [(at(rows, prototypes // 32), 32, at(rows, prototypes)) for rows, prototypes in SHAPES["recipe"]]


def case(rows: int, prototypes: int, dtype: torch.dtype, level: str, contenders: dict) -> Case:
    def inputs(number: int, device: str) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(number + 1000)
        return [torch.randn(rows, prototypes, generator=generator, device=device).to(dtype)]

    elements, reads = rows * prototypes, 3
    # Eager, DINO's form, bytes per element: 20 for cast, division, exponential and transposition (2 + 4, 4 + 4, ...),
    # 8 for the first sum and division, 40 per round (two sums of 4, four divisions of 8), 8 for the last product.
    # Compiled: each sum still ends a kernel; about 60 (a read of fp32 per sum and a write per division pair).
    return Case(
        "sinkhorn_knopp", dtype, f"{rows} x {prototypes}", inputs, contenders,
        moved=reads * elements * dtype.itemsize, eager_moved=(20 + 8 + 3 * 40 + 8 + 6) * elements,
        compiled_moved=60 * elements,
    )  # fmt: skip


def test_sinkhorn_knopp(case: Case, bench) -> None:
    bench(case)
