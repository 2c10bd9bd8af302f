"""CUDA kernels of rope_attention (forward) and rope_rotate, run by the emulator: accuracy, traffic, schedules."""

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor

import dinov3_ext
from dinov3_ext import Layout, _library, rope_attention, rope_attention_reference, rope_rotate, rope_rotate_reference

LENGTHS = (1, 5, 6, 16, 54, 64, 65, 201, 261, 272, 273, 1029)
HALVES = (torch.bfloat16, torch.float16)
LOG2_E = 1.4426950408889634

# (prefix, [(count, h, w)]): lengths of the recipes and around the tiles' edges, packed
MIXES = (
    (5, [(2, 16, 16), (3, 7, 7)]),
    (1, [(1, 14, 14), (1, 2, 3), (4, 1, 1), (2, 6, 6)]),
    (0, [(3, 2, 8), (1, 9, 29), (2, 1, 65)]),
)


def problem(
    groups: Sequence[tuple[int, int, int]],
    *,
    prefix: int,
    heads: int = 2,
    width: int = 64,
    tables: str = "sequence",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Layout]:
    """(qkv, rope, layout)."""
    generator = torch.Generator().manual_seed(len(groups) + width)
    layout = Layout.uniform(list(groups), prefix=prefix, tables=tables)
    angles = 6.3 * torch.rand(layout.rope_rows, width // 4, generator=generator)
    qkv = torch.randn(layout.tokens, 3, heads, width, generator=generator).to(dtype)
    return qkv, torch.stack([angles.cos(), angles.sin()], 1), layout


def plain(qkv: Tensor, rope: Tensor, layout: Layout) -> Tensor:
    """What eager PyTorch makes of it in the dtype of qkv."""
    rotated, outs = rope_rotate_reference(qkv, rope, layout), []
    for first, tokens, *_ in layout.sequences.tolist():
        part = slice(first, first + tokens)
        q, k, v = (x[part].transpose(0, 1)[None] for x in (rotated[:, 0], rotated[:, 1], qkv[:, 2]))
        outs.append(F.scaled_dot_product_attention(q, k, v, scale=qkv.shape[3] ** -0.5)[0].transpose(0, 1))
    return torch.cat(outs)


def forward(qkv: Tensor, rope: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The registered op: whatever the length and architecture, a kernel of our own."""
    groups = [number for group in layout.groups for number in group]
    ops = torch.ops.dinov3_ext_emulator
    return ops.rope_attention(qkv, rope, layout.device_sequences, groups, qkv.shape[3] ** -0.5)


def check(qkv: Tensor, rope: Tensor, layout: Layout) -> None:
    """Output and logarithms of the sums against float64."""
    scale = qkv.shape[3] ** -0.5
    out, lse = forward(qkv, rope, layout)
    wide = (qkv.double(), rope.double(), layout)
    assert out.dtype is qkv.dtype
    assert_accurate(out, plain(qkv, rope, layout), rope_attention_reference(*wide, scale=scale))

    def sums(rotated: Tensor) -> Tensor:
        """(H, tokens), in units of log2."""
        parts = []
        for first, tokens, *_ in layout.sequences.tolist():
            q, k = rotated[first : first + tokens].double().permute(1, 2, 0, 3)  # (H, T, E) each
            parts.append(LOG2_E * (scale * (q @ k.transpose(1, 2))).logsumexp(-1))
        return torch.cat(parts, 1)

    # Rounded as the kernel rounds them, q and k leave an error of fp32 sums alone.
    rounded = sums(rope_rotate_reference(qkv, rope, layout))
    assert lse.shape == (qkv.shape[2], layout.tokens)
    assert lse.dtype is torch.float32
    assert (lse - sums(rope_rotate_reference(*wide))).abs().max() <= 0.02  # two roundings of 2^-9 in some 64 products
    close = (lse - rounded).abs() <= 1e-5 * (1 + rounded.abs())
    assert close.float().mean() > 0.7  # the other rotations may round a product the other way


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("prefix", "groups"), MIXES)
def test_packed_mixes_are_as_good_as_plain_torch(
    emulator: ModuleType, prefix: int, groups: list[tuple[int, int, int]], width: int, dtype: torch.dtype
) -> None:
    check(*problem(groups, prefix=prefix, width=width, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 6, 16, 65])
@pytest.mark.parametrize("architecture", [80, 120])
def test_one_length(emulator: ModuleType, tokens: int, architecture: int) -> None:
    emulator.configure(architecture=architecture)
    check(*problem([(2, 1, tokens)], prefix=0, heads=3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_every_length(emulator: ModuleType, tokens: int, width: int, dtype: torch.dtype, architecture: int) -> None:
    emulator.configure(architecture=architecture)
    for prefix in (0, 1, 5):
        if prefix < tokens:
            check(*problem([(2, 1, tokens - prefix)], prefix=prefix, heads=1, width=width, dtype=dtype))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [65, 128, 145])
def test_long_sequences_stream(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch, tokens: int, width: int) -> None:
    """On sm_120 from 397 (E = 128: 193) tokens on; one such, beside short ones in a launch of their own."""
    emulator.configure(architecture=120)
    longer = tokens + (192 if width == 128 else 396)
    check(*problem([(1, 1, longer), (2, 1, 21)], prefix=5, heads=1, width=width))
    assert {name.split("<")[0].split("::")[-1] for name in emulator.counters()} == {
        "rotate",
        "streaming_forward",
        "resident_forward",
    }


def test_more_groups_than_one_launch_takes(emulator: ModuleType) -> None:
    groups = [(1 + i % 2, 1, 1 + 3 * i) for i in range(19)]
    check(*problem(groups, prefix=2))
    assert sum(count["launches"] for count in emulator.counters().values()) == 2


def test_one_table_for_a_group(emulator: ModuleType) -> None:
    check(*problem([(2, 3, 5), (2, 5, 3)], prefix=1, tables="group"))


@pytest.mark.parametrize("width", [64, 128])
def test_any_strides(emulator: ModuleType, width: int) -> None:
    qkv, rope, layout = problem([(1, 5, 5), (2, 2, 2)], prefix=1, width=width)
    expected = forward(qkv, rope, layout)
    tokens, _, heads, _ = qkv.shape
    wide = torch.full((tokens, 3, heads + 1, width + 8), torch.nan, dtype=qkv.dtype)
    wide[:, :, :heads, :width] = qkv
    parts_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    heads_first = qkv.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    odd = torch.full((tokens * 3 * heads * width + 1,), torch.nan, dtype=qkv.dtype)[1:].view_as(qkv).copy_(qkv)
    columns_apart = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    for strided in (wide[:, :, :heads, :width], parts_first, heads_first, odd, columns_apart):
        for ours, theirs in zip(forward(strided, rope, layout), expected):
            assert torch.equal(ours, theirs)


def test_offsets_past_two_to_the_31(emulator: ModuleType) -> None:
    """Rows 2^31 elements apart, in memory that is reserved and not touched between them."""
    qkv, rope, layout = problem([(1, 1, 3)], prefix=0, heads=1)
    apart = 2**31 + 64
    reserved = torch.empty(2 * apart + 3 * 64, dtype=qkv.dtype)
    far = reserved.as_strided(qkv.shape, (apart, 64, 64, 1))
    far.copy_(qkv)
    for ours, theirs in zip(forward(far, rope, layout), forward(qkv, rope, layout)):
        assert torch.equal(ours, theirs)
    groups = [1, 3]
    rotated = torch.ops.dinov3_ext_emulator.rope_rotate(far, rope, layout.device_sequences, groups)
    assert_accurate(
        rotated, rope_rotate_reference(qkv, rope, layout), rope_rotate_reference(qkv.double(), rope.double(), layout)
    )


def test_nothing_at_all_launches_nothing(emulator: ModuleType) -> None:
    layout = Layout.uniform([], prefix=5)
    with dinov3_ext.use("emulator"):
        out = rope_attention(torch.empty(0, 3, 2, 64).bfloat16(), torch.empty(0, 2, 16), layout, scale=1.0)
        rotated = rope_rotate(torch.empty(0, 3, 2, 64), torch.empty(0, 2, 16), layout)
    assert out.shape == (0, 2, 64)
    assert rotated.shape == (0, 2, 2, 64)
    assert emulator.counters() == {}


@pytest.mark.parametrize(("architecture", "width"), [(90, 64), (90, 128), (120, 128)])
def test_random_schedules_agree_bit_for_bit_and_show_no_hazard(
    emulator: ModuleType, architecture: int, width: int
) -> None:
    """Late and immediate copies, 20 orders of fibers and blocks; on sm_120 both kernels."""
    groups = [(1, 1, 193), (1, 3, 5)] if architecture == 120 else [(1, 5, 10), (3, 3, 5), (2, 1, 1)]
    arguments = problem(groups, prefix=1, heads=2 if width == 64 else 1, width=width)
    emulator.configure(architecture=architecture)
    expected = forward(*arguments)
    for seed in range(1, 21):
        emulator.configure(
            seed=seed, cp_async="now" if seed % 2 else "late", whole_tiles=seed > 2, architecture=architecture
        )
        for ours, theirs in zip(forward(*arguments), expected):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("groups", [[(2, 16, 16)], [(1, 16, 16), (4, 7, 7)], [(3, 14, 14)]])
def test_resident_forward_reads_and_writes_once(
    emulator: ModuleType, groups: list[tuple[int, int, int]], width: int
) -> None:
    """8 bytes per element (q, k, v, out), the row sums, and the rotary table once: counted."""
    qkv, rope, layout = problem(groups, prefix=5, heads=4, width=width, tables="group")
    forward(qkv, rope, layout)
    ((name, count),) = emulator.counters().items()
    assert "resident_forward" in name
    elements = layout.tokens * 4 * width
    sums, table = 4 * layout.tokens * 4, rope.numel() * 4 + layout.sequences.numel() * 4
    moved = 32 * (count["global_read_sectors"] + count["global_written_sectors"])
    assert moved <= 1.05 * (8 * elements + sums + table)
    assert count["global_written_bytes"] == 2 * elements + sums
    # Requested: no row of q, k or v twice; 4 bytes of cosine and sine per element of q and of k, from the caches.
    assert count["copy_async_bytes"] + 2 * elements <= 1.25 * 6 * elements  # rows behind the end are counted as zeros
    assert count["global_read_bytes"] <= 6 * elements + 8 * elements + 64 * 32 * count["blocks"] * 12


@pytest.mark.parametrize("width", [64, 128])
def test_no_bank_conflict(emulator: ModuleType, width: int) -> None:
    """Without prefix: where lanes part, the emulator does not put all their accesses together again."""
    for architecture in (90, 120):  # resident, resident and streaming
        emulator.configure(architecture=architecture)
        forward(*problem([(1, 20, 21), (1, 15, 15), (3, 7, 7), (2, 1, 1)], prefix=0, heads=1, width=width))
    assert all(count["bank_conflicts"] == 0 for count in emulator.counters().values())
    assert sum(count["wavefronts"] for count in emulator.counters().values()) > 10000


@pytest.mark.parametrize("width", [64, 128])
def test_matrix_loads_and_asynchronous_copies_have_no_bank_conflict(emulator: ModuleType, width: int) -> None:
    """With prefix too, where lanes part at the rotation and the emulator counts their plain accesses one by one."""
    forward(*problem([(1, 16, 16), (2, 7, 7)], prefix=5, heads=1, width=width))
    ((name, count),) = emulator.counters().items()
    assert "resident_forward" in name
    assert count["ldmatrix"] > 1000
    assert count["ldmatrix_conflicts"] == count["copy_async_conflicts"] == 0


@pytest.mark.parametrize(("tokens", "tiles"), [(54, 4), (201, 13), (261, 17)])
def test_sequences_are_padded_to_16_rows_only(emulator: ModuleType, tokens: int, tiles: int) -> None:
    forward(*problem([(1, 1, tokens)], prefix=0, heads=1))
    (count,) = emulator.counters().values()
    assert count["mma"] == tiles * tiles * (4 * 2 + 8)  # 16 x 16 scores: 4 steps of 2; 16 x 64 outputs: 8


def test_garbage_behind_and_between_sequences_stays_out(emulator: ModuleType) -> None:
    """NaN in other sequences and behind the last must not reach a sequence whose last tile they would share."""
    qkv, rope, layout = problem([(3, 1, 17)], prefix=0)
    expected = forward(qkv, rope, layout)[0][17:34]
    qkv[:17] = torch.nan
    qkv[34:] = torch.nan
    out = forward(qkv, rope, layout)[0]
    assert torch.equal(out[17:34], expected)
    assert out[:17].isnan().all()


def test_scores_far_apart_stay_finite(emulator: ModuleType) -> None:
    """Maxima that rise from key to key by more than the slack, and rows whose scores are all very low."""
    qkv, rope, layout = problem([(1, 1, 100)], prefix=0, heads=1)
    qkv[:, 0] = 30.0
    qkv[:, 1] = torch.linspace(-30, 30, 100)[:, None, None].to(qkv.dtype)
    rope[:] = torch.tensor([1.0, 0.0])[None, :, None]
    check_out = forward(qkv, rope, layout)[0]
    exact = rope_attention_reference(qkv.double(), rope.double(), layout, scale=0.125)
    assert_accurate(check_out, plain(qkv, rope, layout), exact)
    qkv[:, 0] = -30.0
    exact = rope_attention_reference(qkv.double(), rope.double(), layout, scale=0.125)
    assert_accurate(forward(qkv, rope, layout)[0], plain(qkv, rope, layout), exact)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("width", [64, 128, 20])
def test_rotation_and_its_backward(emulator: ModuleType, width: int, dtype: torch.dtype) -> None:
    qkv, rope, layout = problem([(2, 3, 5), (3, 1, 1)], prefix=2, heads=3, width=width, dtype=dtype)
    cotangent = torch.randn(layout.tokens, 2, 3, width, generator=torch.Generator().manual_seed(3)).to(dtype)

    def both(function, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = function(x, table, layout)
        return out.detach(), torch.autograd.grad(out, x, cotangent.to(x.dtype))[0]

    with dinov3_ext.use("emulator"):
        ours = both(rope_rotate, qkv, rope)
    theirs = both(rope_rotate_reference, qkv, rope)
    exact = both(rope_rotate_reference, qkv.double(), rope.double())
    for what, *three in zip(("out", "gradient"), ours, theirs, exact):
        assert three[0].dtype is dtype
        assert_accurate(*three, what=what)
    assert not ours[1][:, 2].any()
    ((forward_name, forward_count), (_, backward_count)) = sorted(emulator.counters().items())
    assert "rotate" in forward_name
    assert forward_count["launches"] == backward_count["launches"] == 1


@pytest.mark.parametrize("width", [64, 128])
def test_rotation_moves_eight_bytes_per_pair(emulator: ModuleType, width: int) -> None:
    qkv, rope, layout = problem([(4, 8, 8)], prefix=5, heads=4, width=width, tables="group")
    with dinov3_ext.use("emulator"):
        rope_rotate(qkv, rope, layout)
    (count,) = emulator.counters().values()
    elements = layout.tokens * 2 * 4 * width
    moved = 32 * (count["global_read_sectors"] + count["global_written_sectors"])
    assert moved <= 1.05 * (4 * elements + rope.numel() * 4)


@pytest.mark.parametrize(("prefix", "groups"), [*MIXES, (0, [(2, 1, 16)])])
@pytest.mark.parametrize("dtype", HALVES)
def test_public_function_output_and_gradient(
    emulator: ModuleType, prefix: int, groups: list[tuple[int, int, int]], dtype: torch.dtype
) -> None:
    qkv, rope, layout = problem(groups, prefix=prefix, dtype=dtype)
    cotangent = torch.randn(layout.tokens, 2, 64, generator=torch.Generator().manual_seed(3)).to(dtype)

    def both(function, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = function(x, table, layout)
        return out.detach(), torch.autograd.grad(out, x, cotangent.to(x.dtype))[0]

    with dinov3_ext.use("emulator"):
        ours = both(lambda *a: rope_attention(*a, scale=0.125), qkv, rope)
    exact = both(lambda *a: rope_attention_reference(*a, scale=0.125), qkv.double(), rope.double())
    for what, *three in zip(("out", "gradient"), ours, both(plain, qkv, rope), exact):
        assert_accurate(*three, what=what)


def test_long_sequences_of_sm_90_take_torch(emulator: ModuleType) -> None:
    """In one layout: the groups beyond 600 tokens are composed, the others have a kernel."""
    qkv, rope, layout = problem([(1, 1, 20), (1, 1, 640), (2, 1, 30)], prefix=0, heads=1)
    with dinov3_ext.use("emulator"):
        out = rope_attention(qkv, rope, layout, scale=0.125)
    exact = rope_attention_reference(qkv.double(), rope.double(), layout, scale=0.125)
    assert_accurate(out, plain(qkv, rope, layout), exact)
    launches = {name.split("<")[0].split("::")[-1]: count["launches"] for name, count in emulator.counters().items()}
    assert launches == {"resident_forward": 2, "rotate": 1}


def test_fp32_and_other_widths_are_composed(emulator: ModuleType) -> None:
    for width, dtype in ((64, torch.float32), (32, torch.bfloat16)):
        emulator.reset_counters()
        qkv, rope, layout = problem([(2, 3, 4)], prefix=1, width=width, dtype=dtype)
        with dinov3_ext.use("emulator"):
            out = rope_attention(qkv, rope, layout, scale=width**-0.5)
        exact = rope_attention_reference(qkv.double(), rope.double(), layout, scale=width**-0.5)
        assert_accurate(out, plain(qkv, rope, layout), exact)
        (name,) = emulator.counters()
        assert "rotate<" in name


@pytest.mark.parametrize("op", ["rope_attention", "rope_rotate"])
def test_opcheck(emulator: ModuleType, op: str) -> None:
    qkv, rope, layout = problem([(2, 2, 3), (1, 1, 1)], prefix=1)
    arguments = (qkv.requires_grad_(), rope, layout.device_sequences, [2, 7, 1, 2])
    function = getattr(torch.ops.dinov3_ext_emulator, op).default
    torch.library.opcheck(function, (*arguments, 0.125) if op == "rope_attention" else arguments)


def test_compiled_in_one_graph(emulator: ModuleType) -> None:
    def loss(x: Tensor, table: Tensor, layout: Layout) -> Tensor:
        return rope_attention(x, table, layout, scale=0.125).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    with dinov3_ext.use("emulator"):
        for groups in ([(2, 2, 3), (1, 1, 1)], [(1, 3, 3), (2, 1, 2)]):
            qkv, rope, layout = problem(groups, prefix=1)
            qkv.requires_grad_()
            expected = torch.autograd.grad(loss(qkv, rope, layout), qkv)[0]
            got = torch.autograd.grad(compiled(qkv, rope, layout), qkv)[0]
            torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)  # the last rounding of the cotangent


def test_selective_checkpointing_runs_the_forward_once(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    from dinov3_train.models import checkpointing

    kept = tuple(name.replace("dinov3_ext::", "dinov3_ext_emulator::") for name in checkpointing._KEPT)
    monkeypatch.setattr(checkpointing, "_KEPT", kept)
    qkv, rope, layout = problem([(2, 2, 3)], prefix=1)
    qkv.requires_grad_()
    with dinov3_ext.use("emulator"):
        expected = torch.autograd.grad(rope_attention(qkv * 2, rope, layout, scale=0.125).sum(), qkv)[0]
        emulator.reset_counters()
        out = checkpoint(
            lambda x: rope_attention(x * 2, rope, layout, scale=0.125),
            qkv,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(checkpointing._policy),
        )
        assert torch.equal(torch.autograd.grad(out.sum(), qkv)[0], expected)
    launches = {name.split("<")[0].split("::")[-1]: count["launches"] for name, count in emulator.counters().items()}
    assert launches["resident_forward"] == 1


def test_the_plan_fits_every_architecture() -> None:
    if _library.module is None:
        pytest.skip(_library.problem)
    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    for architecture, limit in limits.items():
        for width in (64, 128):
            for tokens in (*LENGTHS, 320, 450, 600, 640, 5000):
                plan = _library.module.rope_attention_plan("bfloat16", width, tokens, architecture)
                composed = architecture in (90, 100) and tokens >= 600
                assert (plan["path"] == "composed") == composed
                if composed:
                    continue
                assert plan["shared_bytes"] <= limit * 1024
                assert 1 <= plan["warps"] <= 20
                if plan["path"] == "resident":
                    assert plan["rows"] >= max(tokens, 128)
                    assert plan["pairs"] == plan["rows"] // (-(-tokens // 16) * 16)
                else:
                    assert 4 * width * tokens > limit * 1024 - 16 * 4 * width
        for dtype, width in (("float32", 64), ("bfloat16", 80)):
            assert _library.module.rope_attention_plan(dtype, width, 54, architecture)["path"] == "composed"


def test_explain_names_kernel_and_tile() -> None:
    if _library.module is None or _library.build_info()["cuda"] is None:
        pytest.skip("built without CUDA kernels")

    def ask(tokens: int, width: int, architecture: str, dtype: torch.dtype = torch.bfloat16) -> str:
        shape = (tokens, 16, width)
        return str(
            dinov3_ext.explain("rope_attention", device="cuda", dtype=dtype, architecture=architecture, shape=shape)
        )

    assert ask(261, 64, "sm_90").startswith("kernel: own CUDA kernel: keys and values of 1 (sequence, head) pairs")
    assert "of 2 (sequence, head) pairs resident" in ask(54, 64, "sm_90")
    assert "streaming past 128 queries" in ask(2309, 64, "sm_120")
    assert ask(2309, 64, "sm_90").startswith("composition: own CUDA kernel for the rotation")
    assert "no attention kernel for E = 80" in ask(54, 80, "sm_80")
    assert "take bf16 and fp16" in ask(54, 64, "sm_80", torch.float32)
    assert dinov3_ext.explain("rope_rotate", device="cuda").path == "kernel"
