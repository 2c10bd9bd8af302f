"""rope_attention and Layout: against float64, against full rotary tables, selection, autocast, errors."""

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor

from dinov3_ext import (
    Layout,
    explain,
    rope_attention,
    rope_attention_reference,
    rope_rotate,
    rope_rotate_reference,
    use,
)

H, E = 2, 16
SCALE = E**-0.5


def problem(
    groups: Sequence[tuple[int, int, int]] = ((2, 4, 4), (3, 2, 3)), *, tables: str = "sequence", prefix: int = 5
) -> tuple[Tensor, Tensor, Layout]:
    """(qkv fp64, rope fp64, layout)."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout.uniform(list(groups), prefix=prefix, tables=tables)
    rows = sum((h + w) * (count if tables == "sequence" else 1) for count, h, w in groups)
    angles = 6.3 * torch.rand(rows, E // 4, dtype=torch.float64, generator=generator)
    qkv = torch.randn(layout.tokens, 3, H, E, dtype=torch.float64, generator=generator)
    return qkv, torch.stack([angles.cos(), angles.sin()], 1).float().double(), layout


def plain(qkv: Tensor, rope: Tensor, layout: Layout) -> Tensor:
    """What eager PyTorch makes of it in the dtype of qkv: rotated, rounded, one fused attention per sequence."""
    rotated, outs = rope_rotate_reference(qkv, rope, layout), []
    for first, tokens, *_ in layout.sequences.tolist():
        part = slice(first, first + tokens)
        q, k, v = (x[part].transpose(0, 1)[None] for x in (rotated[:, 0], rotated[:, 1], qkv[:, 2]))
        outs.append(F.scaled_dot_product_attention(q, k, v, scale=SCALE)[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tables", ["group", "sequence"])
@pytest.mark.parametrize("function", [rope_attention, rope_attention_reference])
def test_output_and_gradient_are_as_good_as_plain_torch(function, tables: str, dtype: torch.dtype) -> None:
    wide, rope, layout = problem(tables=tables)
    qkv = wide.to(dtype)
    cotangent = torch.randn(layout.tokens, H, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def both(which, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = which(x, table, layout)
        return out.detach(), torch.autograd.grad(out, x, cotangent.to(x.dtype))[0]

    ours = both(lambda *a: function(*a, scale=SCALE), qkv, rope.float())
    theirs = both(plain, qkv, rope.float())
    exact = both(lambda *a: rope_attention_reference(*a, scale=SCALE), qkv.double(), rope)
    for what, *three in zip(("out", "gradient"), ours, theirs, exact):
        assert three[0].dtype is dtype
        assert_accurate(*three, what=what)


def test_gradient_of_reference_and_composition_in_float64() -> None:
    qkv, rope, layout = problem([(1, 2, 2), (2, 1, 2)], prefix=2)
    for function in (rope_attention, rope_attention_reference):
        attend = functools.partial(function, rope=rope, layout=layout, scale=SCALE)
        assert torch.autograd.gradcheck(attend, qkv.requires_grad_(), fast_mode=True)
    for function in (rope_rotate, rope_rotate_reference):
        assert torch.autograd.gradcheck(lambda x: function(x, rope, layout), qkv.requires_grad_(), fast_mode=True)


def test_float64_stays_float64_with_a_float32_table() -> None:
    qkv, rope, layout = problem()
    exact = rope_attention_reference(qkv, rope, layout, scale=SCALE)
    torch.testing.assert_close(rope_attention(qkv, rope.float(), layout, scale=SCALE), exact, rtol=1e-12, atol=1e-13)


def test_axial_tables_equal_full_tables_bit_for_bit() -> None:
    """Full table: (patches, E/2) angles repeated for both halves, rotate-half, as DINOv3 has it."""
    qkv, rope, layout = problem([(1, 3, 5)], prefix=1)
    x, table = qkv.float(), rope.float()
    y, w = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    full = torch.cat([table[y.flatten()], table[3 + w.flatten()]], -1)  # (15, 2, E/2)
    cos, sin = torch.cat([full, full], -1)[:, :, None, None].unbind(1)  # (15, 1, 1, E) each
    half = x[1:, :2]
    turned = half * cos + torch.cat([-half[..., E // 2 :], half[..., : E // 2]], -1) * sin
    assert torch.equal(rope_rotate_reference(x, table, layout)[1:], turned)
    torch.testing.assert_close(rope_rotate(x, table, layout)[1:], turned, rtol=0, atol=5e-7)  # a fused multiply-add


def test_prefix_is_not_turned_and_lengths_are_kept() -> None:
    qkv, rope, layout = problem()
    turned = rope_rotate(qkv.float(), rope.float(), layout)
    for first, tokens, prefix, *_ in layout.sequences.tolist():
        assert torch.equal(turned[first : first + prefix], qkv.float()[first : first + prefix, :2])
        norms = turned[first : first + tokens].norm(dim=-1)
        torch.testing.assert_close(norms, qkv.float()[first : first + tokens, :2].norm(dim=-1), rtol=1e-5, atol=0)


def test_sequences_do_not_see_each_other() -> None:
    qkv, rope, layout = problem()
    before = rope_attention(qkv, rope, layout, scale=SCALE)
    qkv[layout.sequences[1, 0] :] += 1.0
    after = rope_attention(qkv, rope, layout, scale=SCALE)
    own = slice(0, int(layout.sequences[1, 0]))
    assert torch.equal(before[own], after[own])


@pytest.mark.parametrize("indices", [[0, 3], [1], [], [0, 1, 2, 3, 4]])
def test_select_keeps_what_it_keeps(indices: list[int]) -> None:
    qkv, rope, layout = problem()
    whole = rope_attention(qkv, rope, layout, scale=SCALE)
    chosen, token_index = layout.select(np.array(indices, dtype=np.int64))
    assert sum(count for count, _ in chosen.groups) == len(indices)
    assert token_index.dtype is torch.int64
    part = rope_attention(qkv[token_index], rope, chosen, scale=SCALE)
    torch.testing.assert_close(part, whole[token_index], rtol=0, atol=1e-12)  # products may be blocked otherwise


def test_layout_lists_rows_as_documented() -> None:
    layout = Layout.uniform([(2, 2, 3), (0, 9, 9), (1, 1, 2)], prefix=1, tables="sequence")
    expected = [[0, 7, 1, 0, 2, 3], [7, 7, 1, 5, 7, 3], [14, 3, 1, 10, 11, 2]]
    assert layout.sequences.tolist() == expected
    assert layout.groups == ((2, 7), (1, 3))
    assert layout.tokens == 17
    assert layout.token_rows[7:14].tolist() == [[-1, -1], [5, 7], [5, 8], [5, 9], [6, 7], [6, 8], [6, 9]]
    assert Layout.uniform([(2, 2, 3)], prefix=1).sequences[:, 3].tolist() == [0, 0]


def test_nothing_at_all() -> None:
    layout = Layout.uniform([], prefix=5)
    assert rope_attention(torch.empty(0, 3, H, E), torch.empty(0, 2, E // 4), layout, scale=1.0).shape == (0, H, E)


def test_autocast_type_is_followed() -> None:
    qkv, rope, layout = problem()
    with torch.autocast("cpu", torch.bfloat16):
        out = rope_attention(qkv.float(), rope.float(), layout, scale=SCALE)
    assert out.dtype is torch.bfloat16
    exact = rope_attention_reference(qkv, rope, layout, scale=SCALE)
    assert_accurate(out, plain(qkv.bfloat16(), rope.float(), layout), exact)


def test_compiled_in_one_graph() -> None:
    qkv, rope, layout = problem()
    qkv, rope = qkv.float().requires_grad_(), rope.float()

    def loss(x: Tensor) -> Tensor:
        return rope_attention(x, rope, layout, scale=SCALE).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(qkv), qkv)[0], torch.autograd.grad(loss(qkv), qkv)[0], rtol=1e-4, atol=1e-5
    )  # fp32 sums in another order


def test_reference_can_be_forced() -> None:
    qkv, rope, layout = problem()
    with use("reference"):
        assert explain("rope_attention").path == "reference"
        forced = rope_attention(qkv, rope, layout, scale=SCALE)
    assert torch.equal(forced, rope_attention_reference(qkv, rope, layout, scale=SCALE))
    assert explain("rope_attention").path != "reference"


def test_errors_name_the_rule() -> None:
    qkv, rope, layout = problem()
    cases = [
        (lambda: rope_attention(qkv[:, :2], rope, layout, scale=1.0), r"qkv must be \(tokens, 3, H, E\)"),
        (lambda: rope_attention(qkv, rope[:, :, 1:], layout, scale=1.0), r"= \(rows, 2, 4\); got \(31, 2, 3\)"),
        (lambda: rope_attention(qkv.float(), rope, layout, scale=1.0), "rope must be float32"),
        (lambda: rope_rotate(qkv[1:], rope, layout), "layout must have as many tokens as qkv, 74; got 75"),
        (lambda: layout.select([2, 1]), "indices must be strictly increasing within 0 .. 4"),
        (lambda: Layout.uniform([(1, 0, 2)], prefix=1), "h >= 1"),
        (lambda: Layout.uniform([], prefix=1, tables="block"), 'tables must be "group" or "sequence"'),
        (lambda: Layout(layout.sequences.long(), layout.groups), "sequences must be an int32 CPU tensor"),
        (lambda: Layout(layout.sequences, layout.groups[:1]), "groups must list"),
        (lambda: rope_attention(qkv, rope[:-9], layout, scale=1.0), "rope must have at least 31 rows"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
