"""Small calls of every op that together reach every kernel: what the mutants and the random schedules run."""

from collections.abc import Callable

import torch
from torch import Tensor

import dinov3_ext

Case = Callable[[], list[Tensor]]


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = function(x, *others)
    cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) if out.dim() else None
    return [out.detach(), *torch.autograd.grad(out, x, cotangent)]


def _gram(images: int, patches: int, width: int, dtype: torch.dtype, clip: str) -> Case:
    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(patches)
        student, teacher = (torch.randn(images, patches, width, generator=generator).to(dtype) for _ in range(2))
        with torch.no_grad():
            loss = dinov3_ext.gram_loss(student, teacher, clip=clip)
        return [loss, *_gradient(lambda x, y: dinov3_ext.gram_loss(x, y, clip=clip), student, teacher)]

    return run


def _sinkhorn(rows: int, prototypes: int, dtype: torch.dtype) -> Case:
    """One rank alone, and the first of two, of which the other has no rows."""
    first_of_two = dinov3_ext.Collectives(
        all_reduce=lambda tensor, op: tensor, all_gather=lambda tensor: tensor, rank=0, world_size=2
    )

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(rows)
        logits = torch.randn(rows, prototypes, generator=generator).to(dtype)
        # One row far from the others: its sum leaves the range of fp32 at first.
        far = logits.clone()
        far[:1] *= 40
        found = []
        for collectives in (dinov3_ext.ALONE, first_of_two):
            for x, iterations in ((logits, 3), (far, 2)):
                potentials = dinov3_ext.sinkhorn_knopp(
                    x, temperature=0.05, iterations=iterations, collectives=collectives
                )
                found += [potentials.rows, potentials.columns]
        return found

    return run


def _cross_entropy(crops: int, rows: int, prototypes: int, dtype: torch.dtype, teachers: int = 2) -> Case:
    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(rows)
        student = torch.randn(crops, rows, prototypes, generator=generator).to(dtype)
        teacher = torch.randn(teachers, rows, prototypes, generator=generator).to(dtype)
        with dinov3_ext.use("reference"):
            potentials = dinov3_ext.sinkhorn_knopp(teacher.flatten(0, 1), temperature=0.07, iterations=3)
        weights = [None, torch.rand(rows, generator=generator)]
        found = []
        for weight in weights:
            for overwrite in (False, True):

                def loss(x: Tensor, weight: Tensor | None = weight, overwrite: bool = overwrite) -> Tensor:
                    return dinov3_ext.assignment_cross_entropy(
                        x.clone(), teacher, potentials, student_temperature=0.1, teacher_temperature=0.07,
                        weight=weight, overwrite_student=overwrite,
                    )  # fmt: skip

                found += _gradient(loss, student)
        return found

    return run


def _attention(groups: list[tuple[int, int, int]], width: int, dtype: torch.dtype, heads: int = 1) -> Case:
    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(width)
        layout = dinov3_ext.Layout.uniform(groups, prefix=5, tables="sequence")
        angles = 6.3 * torch.rand(max(1, layout.rope_rows), width // 4, generator=generator)
        rope = torch.stack([angles.cos(), angles.sin()], 1)
        qkv = torch.randn(layout.tokens, 3, heads, width, generator=generator).to(dtype)
        attention = _gradient(lambda x: dinov3_ext.rope_attention(x, rope, layout, scale=width**-0.5), qkv)
        return [*attention, *_gradient(lambda x: dinov3_ext.rope_rotate(x, rope, layout), qkv)]

    return run


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

# op -> {name: case}
CASES: dict[str, dict[str, Case]] = {
    "gram_loss": {
        "2 x 70 x 72, bf16": _gram(2, 70, 72, _BF16, "none"),
        "1 x 150 x 136, fp32": _gram(1, 150, 136, _FP32, "both"),
        "2 x 17 x 33, fp16": _gram(2, 17, 33, _FP16, "teacher"),
        "1 x 300 x 64, bf16": _gram(1, 300, 64, _BF16, "both"),
    },
    "sinkhorn_knopp": {
        "9 x 1003, fp32": _sinkhorn(9, 1003, _FP32),
        "40 x 4096, bf16": _sinkhorn(40, 4096, _BF16),
        "300 x 264, fp16": _sinkhorn(300, 264, _FP16),
        "1600 x 40, bf16": _sinkhorn(1600, 40, _BF16),
    },
    "assignment_cross_entropy": {
        "2 x 9 x 1003, fp32": _cross_entropy(2, 9, 1003, _FP32),
        "3 x 8 x 4096, bf16": _cross_entropy(3, 8, 4096, _BF16),
        "1 x 20 x 520, fp16": _cross_entropy(1, 20, 520, _FP16, teachers=1),
    },
    "rope_attention": {
        "54 tokens, 64": _attention([(2, 7, 7)], 64, _BF16),
        "1 and 100 tokens, 128": _attention([(1, 1, 1), (1, 5, 19)], 128, _FP16),
        "201 tokens, 64": _attention([(1, 14, 14)], 64, _BF16),
        "261 tokens, 128": _attention([(1, 16, 16)], 128, _BF16),
        "409 tokens, 64": _attention([(1, 20, 20), (1, 2, 2)], 64, _BF16),
        "409 tokens, 128": _attention([(1, 20, 20)], 128, _BF16),
    },
}
