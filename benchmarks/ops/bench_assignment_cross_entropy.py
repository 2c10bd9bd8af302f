"""assignment_cross_entropy (forward and backward) against the reference's autograd and torch.compile of it.

Bytes of ours: forward reads both logits, backward reads both and writes the gradient.
"""

import pytest
import torch
from harness import paired, report, size_in_bytes
from torch import Tensor

from dinov3_ext import Potentials, assignment_cross_entropy, assignment_cross_entropy_reference, sinkhorn_knopp

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.07}


@pytest.mark.parametrize("case", ["dino", "ibot"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_assignment_cross_entropy(full: bool, dtype: torch.dtype, case: str, benchmark) -> None:
    prototypes = 65536 if full else 4096
    crops, views, rows = (10, 2, 16) if case == "dino" else (1, 1, 256)

    def inputs(number: int) -> list[object]:
        generator = torch.Generator().manual_seed(number + 1000)
        student = torch.randn(crops, rows, prototypes, generator=generator).to(dtype).requires_grad_()
        teacher = torch.randn(views, rows, prototypes, generator=generator).to(dtype)
        return [student, teacher, sinkhorn_knopp(teacher.flatten(0, 1), temperature=0.07)]

    def trained(function):
        def run(student: Tensor, teacher: Tensor, potentials: Potentials) -> None:
            function(student, teacher, potentials, **TEMPERATURES).sum().backward()

        return run

    contenders = {"ours": trained(assignment_cross_entropy), "eager": trained(assignment_cross_entropy_reference)}
    if full:
        contenders["torch.compile"] = trained(torch.compile(assignment_cross_entropy_reference, fullgraph=True))
    timings = paired(contenders, inputs, rounds=3)
    student, teacher, _ = inputs(0)
    moved = 3 * size_in_bytes(student) + 2 * size_in_bytes(teacher)
    title = (
        f"assignment_cross_entropy forward + backward, {case}: {crops} x {views} crops, {rows} x {prototypes}, {dtype}"
    )
    benchmark.extra_info["report"] = report(title, timings, moved=moved)
    numbers = iter(range(10_000, 20_000))
    benchmark.pedantic(contenders["ours"], setup=lambda: (inputs(next(numbers)), {}), rounds=3)
