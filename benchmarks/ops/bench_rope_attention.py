"""rope_attention (rotation and attention of packed crops, forward and backward) against eager rotate-half and one
scaled_dot_product_attention per crop group, and torch.compile of that.
"""

import torch
import torch.nn.functional as F
from harness import Case, trained
from torch import Tensor

from dinov3_ext import Layout, rope_attention

# (groups of (sequences, patch rows, patch columns), heads, head width); five prefix tokens
SHAPES = {
    "small": [([(4, 6, 6), (8, 3, 3)], 3, 64)],
    "full": [
        ([(8, 16, 16), (32, 7, 7)], 6, 64),
        ([(32, 7, 7)], 6, 64),  # 54 tokens
        ([(8, 14, 14)], 6, 64),  # 201
        ([(8, 16, 16)], 6, 64),  # 261
        ([(2, 32, 32)], 6, 64),  # 1029
        ([(4, 16, 16)], 16, 64),
        ([(4, 16, 16)], 8, 128),
        ([(1, 32, 32)], 8, 128),
    ],
    "recipe": [
        ([(128, 16, 16)], 16, 64),  # ViT-L, 64 images: global crops of 256 px
        ([(512, 7, 7)], 16, 64),  # local crops of 112 px
        ([(128, 16, 16), (512, 7, 7)], 16, 64),  # both in one call
        ([(32, 16, 16), (128, 7, 7)], 32, 128),  # 7B, 16 images
        ([(16, 48, 48)], 16, 64),  # ViT-L, adaptation to 768 px
        ([(8, 48, 48)], 32, 128),  # 7B, the same
    ],
}
PREFIX = 5
torch._dynamo.config.recompile_limit = 64  # one graph per shape


def eager(qkv: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """Full tables of the patches, rotate-half with a copy, as most models have it."""
    outs, first = [], 0
    angles = torch.cat([table, table[-1:] * 0])[layout.token_rows]  # (tokens, 2, 2, E/4)
    cos = angles[:, :, 0].flatten(1).tile(2)[:, None]
    sin = angles[:, :, 1].flatten(1).tile(2)[:, None]
    prefix = (layout.token_rows[:, 0] < 0)[:, None, None].to(table.device)
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


def cases(level: str) -> list[Case]:
    dtypes = [torch.bfloat16] if level == "recipe" else [torch.bfloat16, torch.float32]
    return [case(*shape, dtype) for shape in SHAPES[level] for dtype in dtypes]


def counted() -> list[tuple[Case, float, Case]]:
    """For counted.py: (case for the emulator, factor, case of a recipe): one head, the fewest sequences of
    the same mix."""
    found = []
    for groups, heads, width in SHAPES["recipe"]:
        fewer = min(count for count, _, _ in groups)
        small = [(count // fewer, height, lines) for count, height, lines in groups]
        found.append((case(small, 1, width, torch.bfloat16), fewer * heads, case(groups, heads, width, torch.bfloat16)))
    return found


def case(groups: list[tuple[int, int, int]], heads: int, width: int, dtype: torch.dtype) -> Case:
    layout = Layout.uniform(groups, prefix=PREFIX, tables="sequence")
    scale = width**-0.5
    on_device: dict[str, Layout] = {}

    def inputs(number: int, device: str) -> list[object]:
        generator = torch.Generator(device).manual_seed(number + 1000)
        angles = 6.3 * torch.rand(layout.rope_rows, width // 4, generator=generator, device=device)
        qkv = torch.randn(layout.tokens, 3, heads, width, generator=generator, device=device)
        there = on_device.setdefault(device, layout.to(device))
        return [qkv.to(dtype).requires_grad_(), torch.stack([angles.cos(), angles.sin()], 1), there]

    def ours(qkv: Tensor, table: Tensor, layout: Layout) -> Tensor:
        return rope_attention(qkv, table, layout, scale=scale)

    contenders = {
        "ours": trained(ours),
        "eager": trained(eager),
        "torch.compile": trained(torch.compile(eager, fullgraph=True)),
    }
    elements = layout.tokens * heads * width  # of q alone
    pairs = sum(count * tokens**2 for count, tokens in layout.groups)
    e = dtype.itemsize
    # Ours: forward reads q, k, v and writes out; backward reads these, out and its gradient, and writes three.
    # Eager, fp32 rotation of 16-bit q and k, bytes per element: cast 6, x cos 8, negated half 4, cat 8, x sin 8, sum
    # 12, cat of the prefix 8, cast back 6: 60 each, forward 2 x 60 + 8; backward about 80 each and 30 of attention's.
    # Compiled: one kernel per rotation, 4 each, and the attention's own 8; backward 45.
    return Case(
        "rope_attention", dtype, f"{[(c, t) for c, t in layout.groups]} x {heads} x {width}, forward + backward",
        inputs, contenders, moved=(4 + 8) * elements * e, flops=14 * pairs * heads * width,
        eager_moved=(128 + 190) * elements, compiled_moved=(16 + 45) * elements,
    )  # fmt: skip


def test_rope_attention(case: Case, bench) -> None:
    bench(case)
