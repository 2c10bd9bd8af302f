"""sinkhorn_knopp: kernels against float64, properties, ranks, extremes."""

import threading

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

import dinov3_ext
from dinov3_ext import ALONE, Collectives, Potentials, _library, assignment, sinkhorn_knopp, sinkhorn_knopp_reference

T = 0.07
SHAPES = [(1, 1), (1, 300), (7, 17), (8, 1024), (9, 1000), (37, 4099), (130, 512), (600, 48), (1100, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The other rank has no rows: the steps between exchanges, which one rank alone does not take.
FIRST_OF_TWO = Collectives(all_reduce=lambda tensor, op: tensor, all_gather=lambda tensor: tensor, rank=0, world_size=2)


def logits_like(rows: int, prototypes: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (spread * torch.randn(rows, prototypes, generator=generator)).to(dtype)


@pytest.fixture(params=_library.module.cpu_variants() if _library.module else ["missing"])
def variant(request: pytest.FixtureRequest) -> str:
    """Each instruction set this CPU runs."""
    before = _library.module.cpu_variant()
    _library.module.set_cpu_variant(request.param)
    yield request.param
    _library.module.set_cpu_variant(before)


def check_against_float64(logits: Tensor, temperature: float = T) -> None:
    plain = sinkhorn_knopp_reference(logits, temperature=temperature)
    exact = sinkhorn_knopp_reference(logits.double(), temperature=temperature)
    for collectives in (ALONE, FIRST_OF_TWO):
        ours = sinkhorn_knopp(logits, temperature=temperature, collectives=collectives)
        assert ours.rows.dtype is ours.columns.dtype is torch.float32
        # A shift between rows and columns changes nothing, so the sum of the two is what must be right.
        assert_accurate(
            *(p.rows[:, None] + p.columns for p in (ours, plain, exact)),
            what=f"potentials of {tuple(logits.shape)}, {collectives.world_size} ranks",
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_potentials_are_as_good_as_plain_torch(variant: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_against_float64(logits_like(*shape, dtype))


@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0, 300.0])
def test_large_logits_stay_finite(variant: str, spread: float) -> None:
    """300 / 0.07 = 4,000 units of exp: the naive form is NaN from 88 on."""
    check_against_float64(logits_like(40, 300, spread=spread))


def test_a_row_far_below_all_others(variant: str) -> None:
    """Its sum with the guessed shift underflows: the kernel must look for the maximum."""
    logits = logits_like(12, 200)
    logits[3] -= 40
    logits[5, :] = 40
    check_against_float64(logits)


def test_rows_sum_to_one_and_columns_share() -> None:
    logits = logits_like(96, 24, spread=0.3)
    p = assignment(logits, sinkhorn_knopp(logits, temperature=T), temperature=T)
    torch.testing.assert_close(p.sum(1), torch.ones(96), rtol=1e-5, atol=0)  # 24 terms of fp32 exp
    # rows = 0 before the first column step, so after one round the columns alone make every column sum to one.
    once = sinkhorn_knopp(logits, temperature=T, iterations=1)
    torch.testing.assert_close((logits / T + once.columns).exp().sum(0), torch.ones(24), rtol=1e-5, atol=0)
    many = sinkhorn_knopp(logits, temperature=0.5, iterations=50)  # converged: 96 rows share 24 columns
    shares = assignment(logits, many, temperature=0.5).sum(0)
    torch.testing.assert_close(shares, torch.full((24,), 4.0), rtol=1e-4, atol=0)


def test_matches_the_textbook_form() -> None:
    """DINO's own loop: exponentials, rows and columns divided by their sums in turn."""
    logits = logits_like(20, 30, torch.float64, spread=0.3)
    q = (logits / T).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    p = sinkhorn_knopp(logits, temperature=T)
    torch.testing.assert_close(assignment(logits, p, temperature=T), q, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_transposed_logits(dtype: torch.dtype) -> None:
    wide = logits_like(20, 96, dtype)
    for view in (wide[::2, :33], wide[:, 5:70], wide.t(), wide[:1].expand(6, 96), wide[:, ::3]):
        for collectives in (ALONE, FIRST_OF_TWO):
            ours, copied = (
                sinkhorn_knopp(x, temperature=T, collectives=collectives) for x in (view, view.contiguous())
            )
            assert torch.equal(ours.rows, copied.rows)
            assert torch.equal(ours.columns, copied.columns)


def test_no_rows() -> None:
    for collectives in (ALONE, FIRST_OF_TWO):
        p = sinkhorn_knopp(torch.empty(0, 11), temperature=T, collectives=collectives)
        assert p.rows.shape == (0,)
        assert torch.equal(p.columns, torch.zeros(11))


def test_minus_infinity_excludes_and_nan_is_seen() -> None:
    for collectives in (ALONE, FIRST_OF_TWO):
        logits = logits_like(10, 12)
        logits[:, 4] = -torch.inf
        p = assignment(logits, sinkhorn_knopp(logits, temperature=T, collectives=collectives), temperature=T)
        assert torch.equal(p[:, 4], torch.zeros(10))
        torch.testing.assert_close(p.sum(1), torch.ones(10), rtol=1e-5, atol=0)  # fp32 exp
        logits[2, 3] = torch.nan
        assert sinkhorn_knopp(logits, temperature=T, collectives=collectives).rows.isnan().any()


def test_result_does_not_depend_on_threads(variant: str) -> None:
    logits = logits_like(77, 5000, torch.bfloat16)
    before = torch.get_num_threads()
    for collectives in (ALONE, FIRST_OF_TWO):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sinkhorn_knopp(logits, temperature=T, collectives=collectives))
        torch.set_num_threads(before)
        for p in results[1:]:
            assert torch.equal(p.rows, results[0].rows)
            assert torch.equal(p.columns, results[0].columns)


def on_ranks(parts: list[Tensor], function) -> list[Potentials]:
    """Runs `function(logits, collectives)` of each rank in a thread of its own; the exchange is in rank order."""
    world, barrier, posted = len(parts), threading.Barrier(len(parts)), [None] * len(parts)
    results: list = [None] * world

    def rank(number: int) -> None:
        def all_reduce(tensor: Tensor, op: str) -> Tensor:
            posted[number] = tensor
            barrier.wait(20)
            every = torch.stack(posted)
            result = every.amax(0) if op == "max" else every.sum(0)
            barrier.wait(20)
            return tensor.copy_(result)  # reuses the storage, as a real one may

        exchange = Collectives(all_reduce=all_reduce, all_gather=lambda tensor: tensor, rank=number, world_size=world)
        results[number] = function(parts[number], exchange)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("function", [sinkhorn_knopp, sinkhorn_knopp_reference])
@pytest.mark.parametrize("sizes", [[5, 5], [1, 8, 3], [0, 6], [9, 0, 0]])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_several_ranks_equal_one(function, sizes: list[int], spread: float) -> None:
    whole = logits_like(sum(sizes), 40, spread=spread)
    exact = sinkhorn_knopp_reference(whole.double(), temperature=T)
    plain = sinkhorn_knopp_reference(whole, temperature=T)
    parts = on_ranks(
        list(whole.split(sizes)), lambda part, exchange: function(part, temperature=T, collectives=exchange)
    )
    rows = torch.cat([p.rows for p in parts])
    for p in parts:
        assert torch.equal(p.columns, parts[0].columns)
        assert_accurate(
            rows[:, None] + p.columns, plain.rows[:, None] + plain.columns, exact.rows[:, None] + exact.columns
        )


def test_float64_takes_the_reference_and_reference_can_be_forced() -> None:
    logits = logits_like(6, 9)
    assert sinkhorn_knopp(logits.double(), temperature=T).rows.dtype is torch.float64
    with dinov3_ext.use("reference"):
        forced = sinkhorn_knopp(logits, temperature=T)
        assert dinov3_ext.explain("sinkhorn_knopp").path == "reference"
    assert torch.equal(forced.rows, sinkhorn_knopp_reference(logits, temperature=T).rows)
    assert dinov3_ext.explain("sinkhorn_knopp").path == "kernel"
    assert dinov3_ext.explain("sinkhorn_knopp", dtype=torch.float64).path == "reference"


def test_explain_names_tiles_and_splits() -> None:
    """As the launchers choose them; no GPU is asked."""
    if _library.build_info()["cuda"] is None:
        pytest.skip("needs a build with nvcc")

    def reason(*shape: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return dinov3_ext.explain("sinkhorn_knopp", device="cuda", dtype=dtype, shape=shape).reason

    assert "256 tiles of 256 columns and all rows an iteration, kept in shared memory, 81 KB" in reason(128, 65536)
    assert "rows in 1 splits, columns in 16 ranges" in reason(128, 65536)
    assert "3072 tiles of 32 columns" in reason(1229, 98304)
    assert "read twice" in reason(4915, 65536)
    assert "rows in 4 splits" in reason(4915, 65536)
    assert "513 tiles of 128 columns" in reason(16, 65540, dtype=torch.float32)  # 16-byte loads need K % 4 == 0
    assert "tiles of 32 columns" in reason(16, 70001)


def test_no_gradient_reaches_the_logits() -> None:
    logits = logits_like(6, 9).requires_grad_()
    assert not sinkhorn_knopp(logits, temperature=T).rows.requires_grad
    assert not sinkhorn_knopp_reference(logits, temperature=T).columns.requires_grad


def test_compiled_in_one_graph() -> None:
    compiled = torch.compile(lambda x: sinkhorn_knopp(x, temperature=T), fullgraph=True)
    for rows in (16, 24):
        logits = logits_like(rows, 64)
        assert torch.equal(compiled(logits).rows, sinkhorn_knopp(logits, temperature=T).rows)


def test_registered_ops_pass_opcheck() -> None:
    ops, logits = torch.ops.dinov3_ext, logits_like(10, 33, torch.bfloat16)
    torch.library.opcheck(ops.sinkhorn_potentials.default, (logits, T, 3))
    torch.library.opcheck(ops.sinkhorn_column_sums.default, (logits, T))
    torch.library.opcheck(ops.sinkhorn_finish.default, (torch.rand(33), torch.rand(33)))
    for column_sums in (False, True):
        torch.library.opcheck(ops.sinkhorn_row_sums.default, (logits, torch.zeros(10), torch.zeros(33), T, column_sums))


def test_registered_ops_check_their_tensors() -> None:
    ops, logits = torch.ops.dinov3_ext, logits_like(4, 6)
    with pytest.raises(RuntimeError, match="sinkhorn_column_sums: logits must be contiguous along K; got stride 6"):
        ops.sinkhorn_column_sums(logits.t(), T)
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16 or float16; got Double"):
        ops.sinkhorn_column_sums(logits.double(), T)
    with pytest.raises(RuntimeError, match="sinkhorn_potentials: iterations must be >= 1; got 0"):
        ops.sinkhorn_potentials(logits, T, 0)
    with pytest.raises(RuntimeError, match="columns must be a contiguous float32 vector of 6 elements"):
        ops.sinkhorn_row_sums(logits, torch.zeros(4), torch.zeros(5), T, False)


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(3), {}, r"sinkhorn_knopp: logits must be \(rows, K\) with K >= 1; got \(3,\)"),
        (torch.zeros(3, 0), {}, r"K >= 1; got \(3, 0\)"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "logits must be floating point; got torch.int64"),
        (torch.zeros(3, 4), {"temperature": 0.0}, "temperature must be > 0; got 0.0"),
        (torch.zeros(3, 4), {"iterations": 0}, "iterations must be >= 1; got 0"),
    ],
)
def test_errors_name_the_rule(logits: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn_knopp(logits, **{"temperature": T, **options})


def test_assignment_wants_matching_potentials() -> None:
    with pytest.raises(ValueError, match=r"potentials must be rows \(2,\) and columns \(3,\); got \(3,\) and \(3,\)"):
        assignment(torch.zeros(2, 3), Potentials(torch.zeros(3), torch.zeros(3)), temperature=T)
