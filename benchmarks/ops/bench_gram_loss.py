"""gram_loss (forward and gradient) against the reference's autograd and torch.compile of it.

FLOPs of ours: two similarity matrices, of which half is made, and one product for the gradient: 4 S N N D.
The reference works in fp32, whatever the features are.
"""

import torch
from harness import Case, trained
from torch import Tensor

from dinov3_ext import gram_loss, gram_loss_reference

# (images, patches, width)
SHAPES = {
    "small": [(4, 100, 192)],
    "full": [(8, 256, 384), (8, 256, 1024), (1, 2304, 1024)],
    "recipe": [(128, 256, 1024), (32, 256, 4096), (16, 2304, 1024), (16, 2304, 4096)],  # 256 px, 768 px; ViT-L, 7B
}


def cases(level: str) -> list[Case]:
    contenders = {
        "ours": trained(gram_loss),
        "eager": trained(gram_loss_reference),
        "torch.compile": trained(torch.compile(gram_loss_reference, fullgraph=True)),
    }
    dtypes = [torch.bfloat16, torch.float32] if level == "full" else [torch.float32]
    return [case(*shape, dtype, level, contenders) for shape in SHAPES[level] for dtype in dtypes]


def counted() -> list[tuple[Case, float, Case]]:
    """For counted.py: (case for the emulator, factor, case of a recipe): one image; those of 2304 patches take minutes
    and are left out."""

    def at(images: int, patches: int, width: int) -> Case:
        return case(images, patches, width, torch.float32, "recipe", {"ours": trained(gram_loss)})

    return [(at(1, *shape), images, at(images, *shape)) for images, *shape in SHAPES["recipe"] if shape[0] <= 256]


def case(images: int, patches: int, width: int, dtype: torch.dtype, level: str, contenders: dict) -> Case:
    def inputs(number: int, device: str) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(number + 1000)
        teacher = torch.randn(images, patches, width, generator=generator, device=device)
        noise = torch.randn(images, patches, width, generator=generator, device=device)
        return [(teacher + 0.1 * noise).to(dtype).requires_grad_(), teacher.to(dtype)]

    features, pairs = images * patches * width, images * patches * patches
    # Eager in fp32, per feature: norm 4 and division 8 of both sides, read by the products 8 + 8 (forward), 16
    # (backward), and the normalisation's backward 28. Per pair: two products written 8, difference 12, square 8,
    # mean 4; backward 4 of the mean, 12 of the square, both operands of the product 8, its transposition 8.
    # Compiled: the elementwise part of a pair is one kernel: 8 written, 8 read; backward 8 read, 4 written, 8 read.
    return Case(
        "gram_loss", dtype, f"{images} x {patches} x {width}, forward + backward", inputs, contenders,
        moved=3 * features * dtype.itemsize, flops=4 * pairs * width,
        eager_moved=84 * features + 64 * pairs, compiled_moved=60 * features + 36 * pairs,
        product=torch.bfloat16 if level == "recipe" else dtype,
    )  # fmt: skip


def test_gram_loss(case: Case, bench) -> None:
    bench(case)
