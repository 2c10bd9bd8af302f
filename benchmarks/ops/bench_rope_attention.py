"""rope_attention (rotation and attention of packed crops, forward and backward) against eager rotate-half and one
scaled_dot_product_attention per crop group, and torch.compile of ours.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import paired, report
from torch import Tensor

from dinov3_ext import Layout, rope_attention

SMALL = ([(4, 6, 6), (8, 3, 3)], 3, 64)
FULL = ([(8, 16, 16), (32, 7, 7)], 6, 64)


def eager(qkv: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """Full tables of the patches, rotate-half with a copy, as most models have it."""
    outs, first = [], 0
    angles = torch.cat([table, table[-1:] * 0])[layout.token_rows]  # (tokens, 2, 2, E/4)
    cos = angles[:, :, 0].flatten(1).tile(2)[:, None]
    sin = angles[:, :, 1].flatten(1).tile(2)[:, None]
    prefix = (layout.token_rows[:, 0] < 0)[:, None, None]
    cos = torch.where(prefix, 1.0, cos)
    q, k, v = qkv.unbind(1)
    half = qkv.shape[-1] // 2
    q, k = (
        (x.float() * cos + torch.cat([-x[..., half:], x[..., :half]], -1).float() * sin).to(v.dtype) for x in (q, k)
    )
    for count, tokens in layout.groups:
        part = slice(first, first + count * tokens)
        three = (x[part].unflatten(0, (count, tokens)).transpose(1, 2) for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(*three).transpose(1, 2).flatten(0, 1))
        first = part.stop
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rope_attention(full: bool, dtype: torch.dtype, benchmark) -> None:
    groups, heads, width = FULL if full else SMALL
    layout = Layout.uniform(groups, prefix=5, tables="sequence")
    scale = width**-0.5

    def inputs(number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number + 1000)
        angles = 6.3 * torch.rand(layout.rope_rows, width // 4, generator=generator)
        qkv = torch.randn(layout.tokens, 3, heads, width, generator=generator).to(dtype).requires_grad_()
        return [qkv, torch.stack([angles.cos(), angles.sin()], 1)]

    def trained(function):
        return lambda qkv, table: function(qkv, table).sum().backward()

    def ours(qkv: Tensor, table: Tensor) -> Tensor:
        return rope_attention(qkv, table, layout, scale=scale)

    contenders = {"ours": trained(ours), "eager": trained(lambda qkv, table: eager(qkv, table, layout))}
    if full:
        contenders["torch.compile, ours"] = trained(torch.compile(ours, fullgraph=True))
    flops = 3 * sum(4 * count * heads * width * tokens**2 for count, tokens in layout.groups)
    timings = paired(contenders, inputs, rounds=5 if full else 3)
    title = f"rope_attention forward + backward, groups {layout.groups}, {heads} x {width}, {dtype}"
    benchmark.extra_info["report"] = report(title, timings, flops=flops)
    numbers = iter(range(10_000, 20_000))
    benchmark.pedantic(contenders["ours"], setup=lambda: (inputs(next(numbers)), {}), rounds=3)
