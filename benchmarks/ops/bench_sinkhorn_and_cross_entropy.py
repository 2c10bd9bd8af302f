"""sinkhorn_knopp and assignment_cross_entropy together, forward and backward: a DINO or iBOT term from its logits.

Against DINO's form (exponentials normalised three times, product with a log-softmax), the log-domain references, and
torch.compile of both. Bytes of ours: three readings of the teacher's logits, and those of assignment_cross_entropy.
"""

import torch
from bench_sinkhorn_knopp import T, naive
from harness import Case, trained
from torch import Tensor

from dinov3_ext import (
    assignment_cross_entropy,
    assignment_cross_entropy_reference,
    sinkhorn_knopp,
    sinkhorn_knopp_reference,
)

# (rows, prototypes)
SHAPES = {
    "small": [(128, 8192)],
    "full": [(128, 65536), (512, 8192), (32, 262144)],
    "recipe": [(128, 65536), (4915, 65536), (32, 262144)],
}


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    return _term(sinkhorn_knopp, assignment_cross_entropy, student, teacher)


def references(student: Tensor, teacher: Tensor) -> Tensor:
    return _term(sinkhorn_knopp_reference, assignment_cross_entropy_reference, student, teacher)


def _term(assign, cross_entropy, student: Tensor, teacher: Tensor) -> Tensor:
    potentials = assign(teacher, temperature=T)
    return cross_entropy(student[None], teacher[None], potentials, student_temperature=0.1, teacher_temperature=T)


def published(student: Tensor, teacher: Tensor) -> Tensor:
    assignments = naive(teacher)
    return -(assignments * torch.log_softmax(student.float() / 0.1, dim=-1)).sum(-1).mean()


def cases(level: str) -> list[Case]:
    contenders = {
        "ours": trained(ours),
        "eager, DINO's form": trained(published),
        "eager, log domain": trained(references),
        "torch.compile, DINO's form": trained(torch.compile(published, fullgraph=True)),
        "torch.compile, log domain": trained(torch.compile(references, fullgraph=True)),
    }
    return [case(rows, prototypes, contenders) for rows, prototypes in SHAPES[level]]


def case(rows: int, prototypes: int, contenders: dict) -> Case:
    def inputs(number: int, device: str) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(number + 1000)
        student, teacher = torch.randn(2, rows, prototypes, generator=generator, device=device).bfloat16()
        return [student.clone().requires_grad_(), teacher]

    # readings of the teacher's logits: three rounds, forward, backward; of the student's: forward, backward; gradient
    return Case(
        "assignment_cross_entropy", torch.bfloat16, f"after sinkhorn_knopp, {rows} x {prototypes}, forward + backward",
        inputs, contenders, moved=(3 + 2 + 2 + 1) * 2 * rows * prototypes,
    )  # fmt: skip


def test_sinkhorn_and_cross_entropy(case: Case, bench) -> None:
    bench(case)
