"""CUDA kernels of the backward of rope_attention, run by the emulator: accuracy, traffic, schedules, and the gradients
of the public function."""

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor

import dinov3_ext
from dinov3_ext import Layout, _library, rope_attention, rope_attention_reference, rope_rotate_reference

HALVES = (torch.bfloat16, torch.float16)
LOG2_E = 1.4426950408889634
Groups = Sequence[tuple[int, int, int]]

# tokens -> (prefix, h, w): lengths of the recipes and around the tiles' edges
SHAPES = {
    1: (0, 1, 1),
    5: (5, 0, 0),
    6: (5, 1, 1),
    16: (0, 4, 4),
    54: (5, 7, 7),
    64: (0, 8, 8),
    65: (1, 8, 8),
    144: (0, 12, 12),
    145: (1, 12, 12),
    201: (5, 14, 14),
    256: (0, 16, 16),
    261: (5, 16, 16),
    272: (0, 16, 17),
    273: (1, 16, 17),
    289: (1, 12, 24),
    1029: (5, 32, 32),
}
# (prefix, groups): packed sequences of several lengths and grids
MIXES = (
    (5, ((2, 16, 16), (3, 7, 7))),
    (1, ((1, 14, 14), (1, 2, 3), (4, 1, 1), (2, 6, 6), (1, 20, 20))),
    (0, ((3, 2, 8), (1, 9, 29), (2, 1, 65), (1, 40, 10))),
)


class Problem:
    """Inputs of the backward; output and logarithms of the sums from the fp32 formula, not from the forward kernel."""

    def __init__(
        self,
        groups: Groups,
        *,
        prefix: int,
        heads: int = 1,
        width: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        if any(0 in (h, w) for _, h, w in groups):  # only prefix tokens
            tables = [[i * prefix, prefix, prefix, 0, 0, 0] for i in range(groups[0][0])]
            self.layout = Layout(torch.tensor(tables, dtype=torch.int32), ((groups[0][0], prefix),))
        else:
            self.layout = Layout.uniform(groups, prefix=prefix, tables="sequence")
        angles = 6.3 * torch.rand(max(self.layout.rope_rows, 1), width // 4, generator=generator)
        self.rope = torch.stack([angles.cos(), angles.sin()], 1)
        self.qkv = torch.randn(self.layout.tokens, 3, heads, width, generator=generator).to(dtype)
        self.grad = torch.randn(self.layout.tokens, heads, width, generator=generator).to(dtype)
        self.scale = width**-0.5
        self.forward()

    def forward(self) -> None:
        """out in the type of qkv, lse (H, tokens) in units of log2."""
        rotated, outs, sums = rope_rotate_reference(self.qkv, self.rope, self.layout).float(), [], []
        for first, tokens, *_ in self.layout.sequences.tolist():
            part = slice(first, first + tokens)
            q, k, v = (x[part].transpose(0, 1) for x in (rotated[:, 0], rotated[:, 1], self.qkv[:, 2].float()))
            scores = self.scale * (q @ k.transpose(1, 2))  # (H, T, T)
            sums.append(scores.logsumexp(-1))
            outs.append((scores - sums[-1][..., None]).exp() @ v)
        self.out = torch.cat(outs, 1).transpose(0, 1).to(self.qkv.dtype).contiguous()
        self.lse = torch.cat(sums, 1).mul(LOG2_E).contiguous()

    def gradient(self, qkv: Tensor | None = None, grad: Tensor | None = None) -> Tensor:
        """What the kernels make of it: (tokens, 3, H, E)."""
        return torch.ops.dinov3_ext_emulator.rope_attention_backward(
            self.grad if grad is None else grad,
            self.qkv if qkv is None else qkv,
            self.rope,
            self.layout.sequences,
            [number for group in self.layout.groups for number in group],
            self.out,
            self.lse,
            self.scale,
        )

    def plain(self) -> Tensor:
        """What eager PyTorch makes of it in the dtype of qkv."""
        return torch.autograd.grad(plain_attention(leaf := self.leaf(), self.rope, self.layout), leaf, self.grad)[0]

    def leaf(self) -> Tensor:
        return self.qkv.detach().clone().requires_grad_()

    def exact(self) -> Tensor:
        leaf = self.qkv.double().requires_grad_()
        out = rope_attention_reference(leaf, self.rope.double(), self.layout, scale=self.scale)
        return torch.autograd.grad(out, leaf, self.grad.double())[0]

    def check(self, ours: Tensor | None = None) -> None:
        """dq, dk and dv, each by the accuracy rule."""
        ours = self.gradient() if ours is None else ours
        assert ours.dtype is self.qkv.dtype
        assert ours.shape == self.qkv.shape
        for what, *three in zip(("dq", "dk", "dv"), *(x.unbind(1) for x in (ours, self.plain(), self.exact()))):
            assert_accurate(*three, what=what)


def plain_attention(qkv: Tensor, rope: Tensor, layout: Layout) -> Tensor:
    rotated, outs = rope_rotate_reference(qkv, rope, layout), []
    for first, tokens, *_ in layout.sequences.tolist():
        part = slice(first, first + tokens)
        q, k, v = (x[part].transpose(0, 1)[None] for x in (rotated[:, 0], rotated[:, 1], qkv[:, 2]))
        outs.append(F.scaled_dot_product_attention(q, k, v, scale=qkv.shape[3] ** -0.5)[0].transpose(0, 1))
    return torch.cat(outs)


def one_length(tokens: int, count: int = 2, **options) -> Problem:
    prefix, height, width = SHAPES[tokens]
    return Problem([(count, height, width)], prefix=prefix, **options)


def kernels(emulator: ModuleType) -> dict[str, dict[str, int]]:
    """Counters by kernel: its name and template arguments."""
    return {name.split("::")[-1]: count for name, count in emulator.counters().items()}


# ---- accuracy ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("prefix", "groups"), MIXES)
def test_packed_mixes_are_as_good_as_plain_torch(
    emulator: ModuleType, prefix: int, groups: Groups, width: int, dtype: torch.dtype
) -> None:
    Problem(groups, prefix=prefix, heads=2, width=width, dtype=dtype).check()


@pytest.mark.parametrize("tokens", SHAPES)
@pytest.mark.parametrize("width", [64, 128])
def test_one_length(emulator: ModuleType, tokens: int, width: int) -> None:
    one_length(tokens, count=1 if tokens > 200 else 3, width=width).check()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", SHAPES)
def test_every_length(emulator: ModuleType, tokens: int, width: int, dtype: torch.dtype, architecture: int) -> None:
    emulator.configure(architecture=architecture)
    one_length(tokens, heads=2, width=width, dtype=dtype, seed=1).check()
    for prefix in {0, 1, 5} if 5 < tokens else {0}:
        Problem([(1, 1, tokens - prefix)], prefix=prefix, width=width, dtype=dtype).check()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [54, 145, 201, 261])
def test_small_shared_memory(emulator: ModuleType, tokens: int, width: int) -> None:
    """Other tiles where a block has 99 or 163 KB instead of 227: as accurate, and the same bits where the sequence
    stays resident, because every sum keeps its order."""
    problem, resident = one_length(tokens, count=1, width=width, seed=2), {}
    for architecture in (80, 90, 120):
        emulator.configure(architecture=architecture)
        emulator.reset_counters()
        ours = problem.gradient()
        problem.check(ours)
        if "backward_resident" in str(kernels(emulator)):
            resident[architecture] = ours
    assert width == 128 or len(resident) == 3
    for ours in resident.values():
        assert torch.equal(ours, resident[90])


@pytest.mark.parametrize("tokens", [54, 289])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_of_hundreds(emulator: ModuleType, sign: float, tokens: int) -> None:
    """Every score near +-400 in units of log2: P must not be made from keys behind the end, where 2^-lse overflows."""
    problem = one_length(tokens, count=1)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(64, generator=generator)
    problem.rope[:, 0], problem.rope[:, 1] = 1.0, 0.0
    problem.qkv[:, 0] += 6 * direction
    problem.qkv[:, 1] += sign * 6 * direction
    problem.forward()
    assert (problem.lse * sign).min() > 250
    problem.check()


def test_nothing_leaks_between_sequences(emulator: ModuleType) -> None:
    """NaN in one sequence, also as its neighbours' padding, stays there."""
    problem = Problem([(2, 7, 7), (1, 20, 20), (1, 3, 3)], prefix=5)
    expected = problem.gradient()
    first, tokens = problem.layout.sequences[1, :2].tolist()
    inside = torch.zeros(problem.layout.tokens, dtype=torch.bool)
    inside[first : first + tokens] = True
    for x in (problem.qkv, problem.grad, problem.out):
        x[inside] = torch.nan
    problem.lse[:, inside] = torch.nan
    ours = problem.gradient()
    assert torch.equal(ours[~inside], expected[~inside])
    assert ours[inside].isnan().all()


# ---- strides, sizes ----


@pytest.mark.parametrize("tokens", [54, 289])
def test_any_strides_of_qkv_and_gradient(emulator: ModuleType, tokens: int) -> None:
    problem = one_length(tokens, heads=2)
    expected = problem.gradient()
    total, _, heads, width = problem.qkv.shape
    wide = torch.full((3, total, heads, 2 * width), torch.nan, dtype=problem.qkv.dtype)
    wide[..., :width] = problem.qkv.transpose(0, 1)
    tall = torch.full((heads, total + 3, width), torch.nan, dtype=problem.qkv.dtype)
    tall[:, 1:-2] = problem.grad.transpose(0, 1)
    strided = wide[..., :width].transpose(0, 1), tall[:, 1:-2].transpose(0, 1)
    assert torch.equal(problem.gradient(*strided), expected)
    odd = torch.full((total, heads, width + 1), torch.nan, dtype=problem.qkv.dtype)  # rows at odd multiples of 2 bytes
    odd[..., 1:] = problem.grad
    assert torch.equal(problem.gradient(grad=odd[..., 1:]), expected)
    assert torch.equal(
        problem.gradient(grad=problem.grad[:1, :1, :1].expand_as(problem.grad)),
        problem.gradient(grad=problem.grad[:1, :1, :1].expand_as(problem.grad).contiguous()),
    )


@pytest.mark.parametrize("tokens", [6, 289])
def test_offsets_past_two_to_the_31(emulator: ModuleType, tokens: int) -> None:
    """Strides alone: the pages between the rows are never touched."""
    problem = one_length(tokens, count=1, heads=2)
    expected = problem.gradient()
    _, _, heads, width = problem.qkv.shape
    reach = (2**32 // tokens + 8) // 8 * 8  # elements from token to token: the last lies behind 2^32 elements
    for part_stride, token_stride, rows in ((width * heads, reach, tokens), (2**31, width * heads, tokens)):
        extent = (rows - 1) * token_stride + 2 * part_stride + heads * width
        qkv = torch.empty(extent, dtype=problem.qkv.dtype).as_strided(
            problem.qkv.shape, (token_stride, part_stride, width, 1)
        )
        qkv.copy_(problem.qkv)
        grad = torch.empty(extent, dtype=problem.qkv.dtype).as_strided(problem.grad.shape, (token_stride, width, 1))
        grad.copy_(problem.grad)
        assert torch.equal(problem.gradient(qkv, grad), expected)


@pytest.mark.slow
def test_more_pairs_than_65535(emulator: ModuleType) -> None:
    emulator.configure(races=False)
    heads = 2049
    problem = Problem([(32, 1, 1)], prefix=0, heads=heads)
    ours = problem.gradient()
    assert sum(count["blocks"] for count in emulator.counters().values()) == 32 * heads > 65535
    # One token: P = 1, so dv is the gradient, dq and dk are zero but for rounding.
    assert torch.equal(ours[:, 2], problem.grad)
    assert ours[:, :2].abs().max() <= 0.05


def test_nothing_at_all(emulator: ModuleType) -> None:
    problem = Problem([(1, 1, 1)], prefix=0, heads=2)
    problem.layout = Layout(torch.empty(0, 6, dtype=torch.int32), ())
    problem.qkv, problem.grad, problem.out = problem.qkv[:0], problem.grad[:0], problem.out[:0]
    problem.lse = problem.lse[:, :0].contiguous()
    assert problem.gradient().shape == (0, 3, 2, 64)
    assert not emulator.counters()


# ---- order, traffic ----


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("groups", [((2, 7, 7), (1, 2, 3)), ((1, 12, 13),), ((1, 12, 25),)])
def test_schedules_find_no_hazard_and_change_no_bit(emulator: ModuleType, groups: Groups, width: int) -> None:
    problem = Problem(groups, prefix=5, width=width)
    expected = problem.gradient()
    assert torch.equal(problem.gradient(), expected)
    for seed in range(1, 21):
        emulator.configure(seed=seed, cp_async="late" if seed % 2 else "now", threads=1 + seed % 2)
        assert torch.equal(problem.gradient(), expected)


def test_lane_by_lane_equals_whole_tiles(emulator: ModuleType) -> None:
    problem = Problem([(1, 12, 25), (1, 9, 9), (1, 3, 3)], prefix=1)
    expected = problem.gradient()
    emulator.configure(whole_tiles=False)
    assert torch.equal(problem.gradient(), expected)


def counted(emulator: ModuleType, problem: Problem) -> tuple[float, float, dict[str, dict[str, int]]]:
    """(bytes per element of q moved in sectors, the same without rotary table and lse, kernels)."""
    problem.gradient()
    total, _, heads, width = problem.qkv.shape
    counts = kernels(emulator)
    moved = 32 * sum(c["global_read_sectors"] + c["global_written_sectors"] for c in counts.values())
    return moved / (total * heads * width), len(counts), counts


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [54, 201, 256, 261, 272])
def test_traffic_of_resident_sequences(emulator: ModuleType, tokens: int, width: int) -> None:
    """q, k, v, out, grad read once and dq, dk, dv written once: 16 bytes per element, and lse."""
    problem = one_length(tokens, count=4, heads=4, width=width)
    per_element, _, counts = counted(emulator, problem)
    tables = (4 * problem.lse.numel() + 4 * problem.rope.numel() + 24 * 4) / problem.grad.numel()
    assert 16 <= per_element <= 1.01 * 16 + tables
    ((name, count),) = counts.items()
    assert name.startswith("backward_resident")
    assert count["bank_conflicts"] == 0
    # Five products at a granularity of 16 x 16; a last warp with half its rows repeats 16 of them, in three products.
    tiles = -(-tokens // 16)
    product = 16 * tiles * tiles * width // 8  # of all 16 pairs
    repeats = tiles > 9 and tiles % 2 == 1 and (width, tiles) != (128, 17)  # there the extra rows are shared out
    assert count["mma"] == 5 * product + repeats * 3 * product // tiles
    assert count["exp2"] == 16 * 256 * tiles * (tiles + repeats)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [289, 1029])
def test_traffic_of_long_sequences(emulator: ModuleType, tokens: int, width: int) -> None:
    """Rotation 8, dQ 12, dK and dV 12: 32 bytes per element, and lse and delta."""
    problem = one_length(tokens, count=1, heads=2, width=width)
    per_element, launches, counts = counted(emulator, problem)
    sums = (4 * problem.lse.numel() + 2 * 4 * problem.lse.numel()) / problem.grad.numel()
    tables = 3 * (4 * problem.rope.numel() + 24) / problem.grad.numel()
    assert launches == 3
    assert 32 <= per_element <= 1.01 * 32 + sums + tables
    for name, count in counts.items():
        assert count["bank_conflicts"] == 0, name


# ---- the choice of tiles ----


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("architecture", "room"), [(80, 163), (90, 227), (120, 99)])
def test_tiles_fit_where_they_are_chosen(width: int, architecture: int, room: int) -> None:
    plans = [_library.module.rope_attention_backward_plan(width, tokens, architecture) for tokens in range(1, 2400)]
    for tokens, plan in enumerate(plans, 1):
        tiles = -(-tokens // 16)
        assert plan["shared_bytes"] <= room * 1024
        assert plan["rows"] % 16 == 0
        if plan["path"] == "resident":
            assert plan["rows"] == 16 * tiles
            assert plan["warps"] == (tiles if tiles <= 9 else 9 if tiles > 17 or (tiles == 17 and width == 64) else 8)
        else:
            blocks = -(-tokens // plan["rows"])
            assert blocks == -(-16 * tiles // 128)  # no more than full blocks would be, and of equal size
            assert blocks * plan["rows"] - 16 * tiles < 32 * blocks
    longest = max(tokens for tokens, plan in enumerate(plans, 1) if plan["path"] == "resident")
    assert longest == {64: 288, 128: {80: 256, 90: 272, 120: 160}[architecture]}[width]
    assert [plan["path"] == "resident" for plan in plans] == [tokens <= longest for tokens in range(1, 2400)]


def test_the_choice_is_explained() -> None:
    asked = {"device": "cuda", "dtype": torch.bfloat16, "architecture": "sm_90"}
    if _library.build_info()["cuda"] is None:
        pytest.skip("built without nvcc")
    assert "backward resident, 8 warps" in dinov3_ext.explain("rope_attention", shape=(261, 16, 128), **asked).reason
    assert "backward streaming" in dinov3_ext.explain("rope_attention", shape=(330, 16, 64), **asked).reason


# ---- the public function ----


def public(problem: Problem, attend, qkv: Tensor) -> Tensor:
    leaf = qkv.detach().clone().requires_grad_()
    return torch.autograd.grad(attend(leaf), leaf, problem.grad)[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [64, 128])
def test_gradient_of_the_public_function(emulator: ModuleType, width: int, dtype: torch.dtype) -> None:
    problem = Problem([(1, 16, 16), (2, 7, 7), (1, 3, 5)], prefix=5, heads=2, width=width, dtype=dtype)
    with dinov3_ext.use("emulator"):
        ours = public(
            problem, lambda x: rope_attention(x, problem.rope, problem.layout, scale=problem.scale), problem.qkv
        )
    problem.check(ours)
    assert any("backward" in name for name in kernels(emulator))


def test_gradient_inside_a_compiled_function(emulator: ModuleType) -> None:
    problem = Problem([(2, 7, 7), (1, 3, 5)], prefix=5, heads=2)

    def attend(x: Tensor) -> Tensor:
        return rope_attention(x, problem.rope, problem.layout, scale=problem.scale)

    with dinov3_ext.use("emulator"):
        eager = public(problem, attend, problem.qkv)
        compiled = public(problem, torch.compile(attend, fullgraph=True, backend="aot_eager"), problem.qkv)
    assert torch.equal(eager, compiled)


def test_gradient_under_autocast(emulator: ModuleType) -> None:
    problem = Problem([(2, 7, 7)], prefix=5, heads=2)

    def attend(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return rope_attention(x, problem.rope, problem.layout, scale=problem.scale)

    with dinov3_ext.use("emulator"):
        ours = public(problem, attend, problem.qkv.float())
    assert ours.dtype is torch.float32
    problem.check(ours.bfloat16())
    assert torch.equal(ours, ours.bfloat16().float())
