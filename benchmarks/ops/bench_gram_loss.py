"""gram_loss (forward and gradient) against the reference's autograd and torch.compile of it.

FLOPs of ours: two similarity matrices and one product for the gradient, 6 S N N D.
"""

import pytest
import torch
from harness import paired, report
from torch import Tensor

from dinov3_ext import gram_loss, gram_loss_reference


@pytest.mark.parametrize("dtype", [torch.float32])
def test_gram_loss(full: bool, dtype: torch.dtype, benchmark) -> None:
    images, patches, width = (8, 256, 1024) if full else (4, 100, 192)

    def inputs(number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number + 1000)
        teacher = torch.randn(images, patches, width, generator=generator).to(dtype)
        noise = torch.randn(images, patches, width, generator=generator).to(dtype)
        return [(teacher + 0.1 * noise).requires_grad_(), teacher]

    def trained(function):
        return lambda student, teacher: function(student, teacher).backward()

    contenders = {"ours": trained(gram_loss), "eager": trained(gram_loss_reference)}
    if full:
        contenders["torch.compile"] = trained(torch.compile(gram_loss_reference, fullgraph=True))
    timings = paired(contenders, inputs, rounds=5 if full else 3)
    title = f"gram_loss forward + backward, {images} x {patches} x {width}, {dtype}"
    benchmark.extra_info["report"] = report(title, timings, flops=6 * images * patches**2 * width)
    numbers = iter(range(10_000, 20_000))
    benchmark.pedantic(contenders["ours"], setup=lambda: (inputs(next(numbers)), {}), rounds=3)
