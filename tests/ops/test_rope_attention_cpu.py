"""The CPU's rope_attention kernels in every instruction set: accuracy, layouts, threads, extremes."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor

from dinov3_ext import (
    Layout,
    _library,
    explain,
    rope_attention,
    rope_attention_reference,
    rope_rotate,
    rope_rotate_reference,
)

pytestmark = pytest.mark.skipif(_library.module is None, reason="the native library is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = {1: (0, 1, 1), 5: (1, 2, 2), 6: (5, 1, 1), 16: (0, 4, 4), 54: (5, 7, 7), 64: (0, 8, 8), 65: (1, 8, 8)}
GRIDS |= {201: (5, 14, 14), 261: (5, 16, 16), 272: (0, 16, 17), 273: (1, 16, 17), 1029: (5, 32, 32)}
MIXED = ((2, 16, 16), (3, 7, 7), (1, 1, 1), (2, 3, 5))


@pytest.fixture(params=_library.module.cpu_variants() if _library.module else ["missing"])
def variant(request: pytest.FixtureRequest) -> str:
    """Each instruction set this CPU runs."""
    before = _library.module.cpu_variant()
    _library.module.set_cpu_variant(request.param)
    yield request.param
    _library.module.set_cpu_variant(before)


def problem(groups: tuple, prefix: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Layout]:
    """(qkv in `dtype`, rope fp32, layout)."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout.uniform(list(groups), prefix=prefix, tables="sequence")
    angles = 6.3 * torch.rand(layout.rope_rows, width // 4, dtype=torch.float64, generator=generator)
    qkv = torch.randn(layout.tokens, 3, heads, width, dtype=torch.float64, generator=generator)
    return qkv.to(dtype), torch.stack([angles.cos(), angles.sin()], 1).float(), layout


def flat(layout: Layout) -> list[int]:
    return [number for group in layout.groups for number in group]


def forward(qkv: Tensor, rope: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.dinov3_ext.rope_attention(qkv, rope, layout.sequences, flat(layout), scale)


def ours(qkv: Tensor, rope: Tensor, layout: Layout, scale: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(out, gradient of qkv) of the kernels."""
    out, lse = forward(qkv, rope, layout, scale)
    ops = torch.ops.dinov3_ext
    return out, ops.rope_attention_backward(grad, qkv, rope, layout.sequences, flat(layout), out, lse, scale)


def plain(qkv: Tensor, rope: Tensor, layout: Layout, scale: float) -> Tensor:
    """What eager PyTorch makes of it: rotated, rounded, one fused attention per sequence."""
    rotated, outs = rope_rotate_reference(qkv, rope, layout), []
    for first, tokens, *_ in layout.sequences.tolist():
        part = slice(first, first + tokens)
        q, k, v = (x[part].transpose(0, 1)[None] for x in (rotated[:, 0], rotated[:, 1], qkv[:, 2]))
        outs.append(F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1))
    return torch.cat(outs)


def with_gradient(function, qkv: Tensor, *rest, grad: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *rest)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


@functools.cache
def judged(groups: tuple, prefix: int, heads: int, width: int, dtype: torch.dtype, spread: float = 1.0) -> tuple:
    """(inputs of `ours`, what plain PyTorch makes of them, float64): the same for every instruction set."""
    qkv, rope, layout = problem(groups, prefix, heads, width, dtype)
    scale = spread * width**-0.5
    grad = torch.randn(layout.tokens, heads, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = with_gradient(plain, qkv, rope, layout, scale, grad=grad)

    def reference(x: Tensor) -> Tensor:
        return rope_attention_reference(x, rope.double(), layout, scale=scale)

    return (qkv, rope, layout, scale, grad), theirs, with_gradient(reference, qkv.double(), grad=grad.double())


def check(results: tuple[Tensor, Tensor], theirs: tuple, exact: tuple) -> None:
    """Output and the gradients of q, k and v, each by the accuracy rule."""
    assert_accurate(results[0], theirs[0], exact[0], what="out")
    for part, name in enumerate("qkv"):
        assert_accurate(
            *(gradient[:, part] for gradient in (results[1], theirs[1], exact[1])), what=f"gradient of {name}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", GRIDS)
def test_every_regime_of_lengths(variant: str, tokens: int, dtype: torch.dtype) -> None:
    prefix, height, width = GRIDS[tokens]
    inputs, theirs, exact = judged(((1, height, width),), prefix, 1, 64, dtype)
    assert inputs[2].tokens == tokens
    check(ours(*inputs), theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 96, 112, 128])
def test_every_width_of_heads_and_packed_mixes(variant: str, width: int, dtype: torch.dtype) -> None:
    inputs, theirs, exact = judged(MIXED, 5, 2, width, dtype)
    check(ours(*inputs), theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_flat_and_saturated_softmax(variant: str, spread: float, dtype: torch.dtype) -> None:
    """A factor of 30 gives scores of +-100 and more: one key takes everything."""
    inputs, theirs, exact = judged(((2, 7, 7), (1, 20, 20)), 1, 1, 64, dtype, spread)
    check(ours(*inputs), theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logarithms_of_the_sums(variant: str, dtype: torch.dtype) -> None:
    qkv, rope, layout = problem(((1, 20, 20), (2, 3, 5)), 5, 2, 64, dtype)
    rotated = rope_rotate_reference(qkv, rope, layout).double()
    _, lse = forward(qkv, rope, layout, 0.125)
    assert lse.shape == (2, layout.tokens)
    for first, tokens, *_ in layout.sequences.tolist():
        q, k = rotated[first : first + tokens].permute(1, 2, 0, 3)  # (H, T, E) each
        exact = torch.logsumexp(0.125 * q @ k.transpose(1, 2), -1) / math.log(2)
        # Scores of up to 10 in fp32 sums; q and k are rounded before the product, here and there alike.
        torch.testing.assert_close(
            lse[:, first : first + tokens].double(), exact, rtol=0, atol=1e-2 if dtype is not torch.float32 else 1e-5
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 32, 48, 64, 128])
def test_rotation_and_back(variant: str, width: int, dtype: torch.dtype) -> None:
    qkv, rope, layout = problem(MIXED, 5, 3, width, dtype)
    ops, rest = torch.ops.dinov3_ext, (rope, layout.sequences, flat(layout))
    exact = rope_rotate_reference(qkv.double(), rope.double(), layout)
    rotated = ops.rope_rotate(qkv, *rest)
    assert_accurate(rotated, rope_rotate_reference(qkv, rope, layout), exact)
    mirrored = torch.stack([rope[:, 0], -rope[:, 1]], 1)  # the rotation back turns by the negative angles
    exact = rope_rotate_reference(qkv.double(), mirrored.double(), layout)
    back = ops.rope_rotate_backward(qkv[:, :2].contiguous(), *rest)
    assert_accurate(back, rope_rotate_reference(qkv, mirrored, layout), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_stride(variant: str, dtype: torch.dtype) -> None:
    inputs, _, _ = judged(MIXED, 5, 2, 64, dtype)
    qkv, rope, layout, scale, grad = inputs
    expected = ours(*inputs)
    heads_first = qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    gaps = torch.full((2 * layout.tokens, 4, 3, 96), torch.nan, dtype=dtype)[::2, :3, 1:, 16:80].copy_(qkv)
    last_strided = qkv.transpose(0, 3).contiguous().transpose(0, 3)
    odd = torch.empty(qkv.numel() + 1, dtype=dtype)[1:].view_as(qkv).copy_(qkv)  # not aligned to 16 bytes
    for strided in (heads_first, gaps, last_strided, odd):
        of_heads = grad.transpose(0, 1).contiguous().transpose(0, 1)
        for result, wanted in zip(ours(strided, rope, layout, scale, of_heads), expected):
            assert torch.equal(result, wanted)
    summed = torch.ones((), dtype=dtype).expand_as(grad)  # the gradient of a sum: strides of zero
    assert torch.equal(
        ours(qkv, rope, layout, scale, summed)[1], ours(qkv, rope, layout, scale, summed.contiguous())[1]
    )


def test_nothing_and_one_row(variant: str) -> None:
    for dtype in DTYPES:
        qkv, rope, layout = problem((), 5, 2, 64, dtype)
        out, gradient = ours(qkv, rope, layout, 1.0, qkv[:, 0])
        assert out.shape == (0, 2, 64)
        assert gradient.shape == (0, 3, 2, 64)
        qkv, rope, layout = problem(((1, 1, 1),), 0, 2, 64, dtype)
        out, gradient = ours(qkv, rope, layout, 1.0, qkv[:, 0])
        # The weight of one key is exp2(scale s - scale s), the first product rounded: 1 to an ulp of the score.
        torch.testing.assert_close(out, qkv[:, 2], rtol=1e-5, atol=0)
        assert gradient[:, :2].count_nonzero() == 0
        torch.testing.assert_close(gradient[:, 2], qkv[:, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_groups_than_one_call_takes(variant: str, dtype: torch.dtype) -> None:
    inputs, theirs, exact = judged(tuple((1 + i % 2, 1, 1 + i) for i in range(19)), 2, 1, 32, dtype)
    check(ours(*inputs), theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(variant: str, dtype: torch.dtype) -> None:
    inputs, _, _ = judged(MIXED, 5, 3, 64, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(ours(*inputs))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_sequence_and_head(variant: str, dtype: torch.dtype) -> None:
    """Rows are padded to whole tiles inside: what lies beside them must not be read, NaN times zero is NaN."""
    (qkv, rope, layout, scale, grad), _, _ = judged(MIXED, 5, 2, 64, dtype)
    clean = ours(qkv, rope, layout, scale, grad)
    poisoned = qkv.clone()
    first, tokens = layout.sequences[3, :2].tolist()
    poisoned[first : first + tokens, :, 1] = torch.nan
    for result, wanted in zip(ours(poisoned, rope, layout, scale, grad), clean):
        assert result[first : first + tokens].unbind(-2)[1].isnan().all()
        result[first : first + tokens].unbind(-2)[1].copy_(wanted[first : first + tokens].unbind(-2)[1])
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_of_scores_is_kept(dtype: torch.dtype) -> None:
    """4097 tokens: the scores of one head would take 67 MB in fp32."""
    try:
        peak = open("/proc/self/clear_refs", "w")
    except OSError:
        pytest.skip("needs /proc/self/clear_refs")
    qkv, rope, layout = problem(((1, 64, 64),), 1, 1, 64, dtype)

    def resident(line: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(row.split()[1]) for row in status if row.startswith(line))

    with peak:
        peak.write("5")
    before = resident("VmRSS:")
    ours(qkv, rope, layout, 0.125, qkv[:, 0])
    assert resident("VmHWM:") - before < 24_000  # kB; inputs and results of 3 MB each, 6 MB kept for the sequence


def test_products_of_torch_go_on_between_ours(variant: str) -> None:
    """AMX: both sides configure the thread's tiles."""
    a, b = torch.randn(2, 256, 256).bfloat16()
    inputs, _, _ = judged(MIXED, 5, 2, 64, torch.bfloat16)
    product, expected = a @ b, ours(*inputs)
    for _ in range(3):
        assert torch.equal(a @ b, product)
        assert all(torch.equal(x, y) for x, y in zip(ours(*inputs), expected))
        scores = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 300, 64).bfloat16())
        assert torch.isfinite(scores).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_public_functions_take_the_kernels(variant: str, dtype: torch.dtype) -> None:
    inputs, theirs, exact = judged(MIXED, 5, 2, 64, dtype)
    qkv, rope, layout, scale, grad = inputs
    for op in ("rope_attention", "rope_rotate"):
        path = explain(op, dtype=dtype, shape=(261, 2, 64))
        assert path.path == ("composition" if variant == "portable" else "kernel")
        assert variant == "portable" or variant in path.reason
        assert explain(op, dtype=dtype, shape=(261, 2, 24)).path == "composition"
        assert explain(op, dtype=torch.float64).path == "composition"

    def public(x: Tensor) -> Tensor:
        return rope_attention(x, rope, layout, scale=scale)

    results = with_gradient(public, qkv, grad=grad)
    check(results, theirs, exact)
    rotated = rope_rotate(qkv, rope, layout)
    if variant != "portable":
        assert all(torch.equal(result, wanted) for result, wanted in zip(results, ours(*inputs)))
        assert torch.equal(rotated, torch.ops.dinov3_ext.rope_rotate(qkv, rope, layout.sequences, flat(layout)))
    with_gradient(lambda x: rope_attention(x, rope[..., :6], layout, scale=scale), qkv[..., :24], grad=grad[..., :24])


def test_gradient_of_the_rotation(variant: str) -> None:
    """The rotation keeps lengths, so turning back its result as the gradient gives q and k again; v gets none."""
    qkv, rope, layout = problem(MIXED, 5, 2, 64, torch.float32)
    qkv.requires_grad_()
    rotated = rope_rotate(qkv, rope, layout)
    gradient = torch.autograd.grad(rotated, qkv, rotated.detach())[0]
    torch.testing.assert_close(gradient[:, :2], qkv.detach()[:, :2], rtol=1e-5, atol=1e-6)  # cos^2 + sin^2 in fp32
    assert gradient[:, 2].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_in_one_graph(dtype: torch.dtype) -> None:
    (qkv, rope, layout, scale, grad), _, _ = judged(MIXED, 5, 2, 64, dtype)

    def attend(x: Tensor) -> Tensor:
        return rope_attention(x, rope, layout, scale=scale)

    compiled = with_gradient(torch.compile(attend, fullgraph=True), qkv, grad=grad)
    assert all(torch.equal(a, b) for a, b in zip(compiled, with_gradient(attend, qkv, grad=grad)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_as_torch_wants_it(dtype: torch.dtype) -> None:
    qkv, rope, layout = problem(((1, 3, 3), (1, 2, 2)), 1, 1, 16, dtype)
    arguments = (qkv.requires_grad_(), rope, layout.sequences, flat(layout))
    torch.library.opcheck(torch.ops.dinov3_ext.rope_attention.default, (*arguments, 0.25))
    torch.library.opcheck(torch.ops.dinov3_ext.rope_rotate.default, arguments)
