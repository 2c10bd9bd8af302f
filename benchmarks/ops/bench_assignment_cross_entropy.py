"""assignment_cross_entropy (forward and backward) against the reference's autograd and torch.compile of it.

Bytes of ours: forward reads both logits, backward reads both and writes the gradient.
"""

import torch
from harness import Case, trained
from torch import Tensor

from dinov3_ext import Potentials, assignment_cross_entropy, assignment_cross_entropy_reference

# (student crops, teacher crops, images or patches, prototypes)
SHAPES = {
    "small": [(10, 2, 16, 4096), (1, 1, 256, 4096)],
    "full": [(10, 2, 16, 65536), (1, 1, 256, 65536)],
    "recipe": [(10, 2, 64, 65536), (1, 1, 4915, 65536), (10, 2, 16, 262144), (1, 1, 1229, 98304)],
}


def temperatures(function):
    def run(student: Tensor, teacher: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return function(student, teacher, Potentials(rows, columns), student_temperature=0.1, teacher_temperature=0.07)

    return run


def cases(level: str) -> list[Case]:
    reference = temperatures(assignment_cross_entropy_reference)
    contenders = {
        "ours": trained(temperatures(assignment_cross_entropy)),
        "eager": trained(reference),
        "torch.compile": trained(torch.compile(reference, fullgraph=True)),
    }
    dtypes = [torch.bfloat16] if level == "recipe" else [torch.bfloat16, torch.float32]
    return [case(*shape, dtype, contenders) for shape in SHAPES[level] for dtype in dtypes]


def counted() -> list[tuple[Case, float, Case]]:
    """For counted.py: (case for the emulator, factor, case of a recipe): fewer prototypes."""

    def at(crops: int, views: int, rows: int, prototypes: int) -> Case:
        contenders = {"ours": trained(temperatures(assignment_cross_entropy))}
        return case(crops, views, rows, prototypes, torch.bfloat16, contenders)

    return [(at(*shape, k // 32), 32, at(*shape, k)) for *shape, k in SHAPES["recipe"]]


def case(crops: int, views: int, rows: int, prototypes: int, dtype: torch.dtype, contenders: dict) -> Case:
    def inputs(number: int, device: str) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(number + 1000)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        student = draw(crops, rows, prototypes).to(dtype).requires_grad_()
        teacher = draw(views, rows, prototypes).to(dtype)
        # Rows that sum to about one, as after sinkhorn_knopp: exp(x / .07) has mean exp(102).
        potentials = -102.0 - draw(prototypes) * 0.1
        log_sums = torch.logsumexp(teacher.flatten(0, 1).float() / 0.07 + potentials, 1)
        return [student, teacher, -log_sums, potentials]

    student, teacher = crops * rows * prototypes, views * rows * prototypes
    # Eager, per student logit: cast 2 + 4, division 8, log-softmax 12, product with p 4, 8 more where crops are paired;
    # backward the same once more and 2 for the gradient. Per teacher logit: cast 6, division 8, two sums 16,
    # exponential 8, product 4.
    eager = (38 + 40) * student + 42 * teacher
    # Compiled: per student logit two reads and one fp32 log-softmax written and read, the same in backward; the
    # probabilities written in fp32 and read by the product, forward and backward.
    compiled = (2 * 2 + 4 + 4 + 2 + 4 + 4 + 2) * student + (2 + 4 + 4 + 4) * teacher
    return Case(
        "assignment_cross_entropy", dtype, f"{crops} crops x {views}, {rows} x {prototypes}, forward + backward",
        inputs, contenders, moved=(3 * student + 2 * teacher) * dtype.itemsize, eager_moved=eager,
        compiled_moved=compiled,
    )  # fmt: skip


def test_assignment_cross_entropy(case: Case, bench) -> None:
    bench(case)
