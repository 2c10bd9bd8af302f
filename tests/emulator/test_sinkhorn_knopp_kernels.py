"""The CUDA kernels of sinkhorn_knopp, run by the emulator: accuracy, layouts, ranks, schedules, counted traffic."""

from itertools import product
from types import ModuleType

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

import dinov3_ext
from dinov3_ext import ALONE, Collectives, Potentials, sinkhorn_knopp, sinkhorn_knopp_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROTOTYPES = [1, 2, 7, 8, 9, 255, 256, 1000, 4096]
ROWS = [0, 1, 2, 7, 33, 128]
T = 0.07
# The other rank has no rows: the steps between exchanges, which one rank alone does not take.
FIRST_OF_TWO = Collectives(all_reduce=lambda tensor, op: tensor, all_gather=lambda tensor: tensor, rank=0, world_size=2)

pytestmark = pytest.mark.usefixtures("emulator")


def logits(rows: int, prototypes: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows + prototypes)
    return (spread * torch.randn(rows, prototypes, generator=generator)).to(dtype)


def kernels(logits: Tensor, temperature: float = T, **options) -> Potentials:
    with dinov3_ext.use("emulator"):
        return sinkhorn_knopp(logits, temperature=temperature, **options)


def exponents(potentials: Potentials) -> Tensor:
    """A shift between rows and columns changes nothing, so the sum of the two is what must be right."""
    return potentials.rows[:, None] + potentials.columns


def check(logits: Tensor, temperature: float = T, iterations: int = 3) -> None:
    """By the accuracy rule; torch in the same dtype is the reference in logarithms."""
    plain = sinkhorn_knopp_reference(logits, temperature=temperature, iterations=iterations)
    exact = sinkhorn_knopp_reference(logits.double(), temperature=temperature, iterations=iterations)
    for collectives in (ALONE, FIRST_OF_TWO):
        ours = kernels(logits, temperature, iterations=iterations, collectives=collectives)
        assert ours.rows.dtype is ours.columns.dtype is torch.float32
        if not logits.shape[0]:
            assert torch.equal(ours.columns, torch.zeros(logits.shape[1]))
        what = f"potentials of {tuple(logits.shape)}, {collectives.world_size} ranks"
        assert_accurate(*map(exponents, (ours, plain, exact)), what=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prototypes", PROTOTYPES)
def test_prototypes(prototypes: int, dtype: torch.dtype) -> None:
    for rows in (1, 7, 33):
        check(logits(rows, prototypes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*ROWS, 129, 300])
def test_rows(rows: int, dtype: torch.dtype) -> None:
    """More than 128 rows: several splits, whose partial results are added."""
    check(logits(rows, 264, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prototypes", PROTOTYPES)
def test_full_matrix(prototypes: int, dtype: torch.dtype) -> None:
    for rows, iterations in product([*ROWS, 129, 300], (1, 3)):
        check(logits(rows, prototypes, dtype), iterations=iterations)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "prototypes"), [(7, 65536), (33, 70001), (128, 65536)])
def test_many_prototypes(rows: int, prototypes: int, dtype: torch.dtype) -> None:
    check(logits(rows, prototypes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "prototypes"), [(4, 66048), (130, 512), (400, 136), (900, 96), (2000, 64), (1700, 33)]
)
def test_every_tile_of_one_rank_alone(rows: int, prototypes: int, dtype: torch.dtype) -> None:
    """Tiles of 32, 8 and 4 lanes, kept in shared memory or read twice; one element at a time too."""
    check(logits(rows, prototypes, dtype))


def test_several_ranges_of_columns() -> None:
    """Few rows and many prototypes: a row's columns in 9 ranges, the last one partly filled."""
    check(logits(2, 33000, torch.bfloat16))
    check(logits(5, 33001, torch.float32))


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_iterations(iterations: int) -> None:
    check(logits(40, 72), iterations=iterations)


# ---- layouts ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype) -> None:
    """Aligned rows apart, odd rows, an odd start, rows turned over, every third column, one row for all."""
    wide = logits(24, 304, dtype)
    views = [wide[::2, :264], wide[:, :263], wide[:, 5:269], wide.flatten()[1 : 1 + 24 * 264].view(24, 264)]
    views += [wide.t(), wide[:, ::3], wide[:1].expand(6, 304)]
    for view in views:
        check(view)


def test_strides_beyond_32_bits() -> None:
    """Rows 2^31 elements apart (never touched between, so no memory is taken)."""
    near = logits(3, 72, torch.bfloat16)
    far = torch.empty(2**32 + 4096, dtype=torch.bfloat16).as_strided((3, 72), (2**31 + 1024, 1)).copy_(near)
    for collectives in (ALONE, FIRST_OF_TWO):
        ours, expected = (kernels(x, collectives=collectives) for x in (far, near))
        assert torch.equal(ours.rows, expected.rows)
        assert torch.equal(ours.columns, expected.columns)


# ---- numbers at the edge ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_extreme_logits(spread: float, dtype: torch.dtype) -> None:
    """30 / 0.03 = 1,000 units of exp: the naive form is NaN from 88 on."""
    check(logits(40, 304, dtype, spread), 0.03)


def test_a_row_far_from_all_others() -> None:
    given = logits(12, 200)
    given[3] -= 40
    given[5, :] = 40
    check(given)


@pytest.mark.parametrize("rows", [5, 200])
def test_minus_infinity_excludes(rows: int) -> None:
    """Columns of -inf keep potential 0; a whole 16-byte vector of them too."""
    given = logits(rows, 48)
    given[:, 3] = -torch.inf
    given[:, 16:24] = -torch.inf
    given[1, :40] = -torch.inf
    exact = sinkhorn_knopp_reference(given.double(), temperature=T)
    plain = sinkhorn_knopp_reference(given, temperature=T)
    for collectives in (ALONE, FIRST_OF_TWO):
        ours = kernels(given, collectives=collectives)
        assert torch.equal(ours.columns[given.isinf().all(0)], torch.zeros(9))
        assert_accurate(*map(exponents, (ours, plain, exact)))


def test_nan_is_seen() -> None:
    given = logits(40, 24)
    given[2, 3] = torch.nan
    for collectives in (ALONE, FIRST_OF_TWO):
        potentials = kernels(given, collectives=collectives)
        assert potentials.columns[3].isnan()
        assert potentials.rows[2].isnan()


# ---- ranks ----


@pytest.mark.parametrize("sizes", [[5, 5], [0, 6], [9, 0, 0]])
def test_ranks(sizes: list[int]) -> None:
    """Each exchange is answered with the true maximum or sum over ranks, found by running all ranks up to there."""
    whole = logits(sum(sizes), 40, spread=10.0)
    parts = list(whole.split(sizes))

    class Missing(Exception):
        pass

    answers: list[Tensor] = []  # of the exchanges so far
    while True:
        asked, results = [], []
        for rank, part in enumerate(parts):
            exchanges = iter(answers)

            def all_reduce(tensor: Tensor, op: str, exchanges=exchanges) -> Tensor:
                answer = next(exchanges, None)
                if answer is None:
                    asked.append((tensor.clone(), op))
                    raise Missing
                return tensor.copy_(answer)

            collectives = Collectives(
                all_reduce=all_reduce, all_gather=lambda tensor: tensor, rank=rank, world_size=len(parts)
            )
            try:
                results.append(kernels(part, collectives=collectives))
            except Missing:
                continue
        if results:
            break
        every = torch.stack([tensor for tensor, _ in asked])
        answers.append(every.amax(0) if asked[0][1] == "max" else every.sum(0))
    assert len(answers) == 4
    assert len(results) == len(parts)
    plain, exact = (sinkhorn_knopp_reference(x, temperature=T) for x in (whole, whole.double()))
    for potentials in results:
        assert torch.equal(potentials.columns, results[0].columns)
    ours = Potentials(torch.cat([potentials.rows for potentials in results]), results[0].columns)
    assert_accurate(*map(exponents, (ours, plain, exact)))


# ---- order ----


def test_twenty_schedules_give_the_same_bits(emulator: ModuleType) -> None:
    given = logits(140, 1048, torch.bfloat16)
    for collectives in (ALONE, FIRST_OF_TWO):
        emulator.configure()
        first = kernels(given, collectives=collectives)
        for seed in range(1, 21):
            emulator.configure(seed=seed, threads=1 + seed % 2)
            ours = kernels(given, collectives=collectives)
            assert torch.equal(ours.rows, first.rows)
            assert torch.equal(ours.columns, first.columns)


# ---- traffic ----


def counted(emulator: ModuleType, given: Tensor, collectives: Collectives) -> dict[str, int]:
    """Sums over the launches of three iterations."""
    emulator.reset_counters()
    kernels(given, collectives=collectives)
    counts = emulator.counters().values()
    return {name: sum(one[name] for one in counts) for name in next(iter(counts))}


@pytest.mark.parametrize(("rows", "prototypes", "columns"), [(32, 65536, 256), (512, 1024, 64), (1229, 512, 32)])
def test_bytes_of_one_rank_alone(emulator: ModuleType, rows: int, prototypes: int, columns: int) -> None:
    """Three readings of the bf16 logits, 6 bytes each; potentials and the tiles' shares of the rows beside them."""
    counts = counted(emulator, logits(rows, prototypes, torch.bfloat16), ALONE)
    elements = rows * prototypes
    sectors = 32 * (counts["global_read_sectors"] + counts["global_written_sectors"])
    requested = counts["global_read_bytes"] + counts["global_written_bytes"]
    # Columns written three times; shares of 8 bytes written and read three times; rows written three times, read twice
    # by each tile, which meet the same sectors.
    most = 6 + 3 * 4 / rows + 3 * 16 / columns + 5 * 4 / prototypes
    assert 6 <= sectors / elements <= 1.02 * most
    # Potentials of the rows: 4 bytes for every 16 bytes of logits.
    assert requested / elements <= 1.02 * (most + 2 * 4 / 8)
    assert counts["bank_conflicts"] == 0


@pytest.mark.parametrize(("rows", "prototypes"), [(128, 2048), (512, 1024), (1229, 512)])
def test_bytes_between_exchanges(emulator: ModuleType, rows: int, prototypes: int) -> None:
    """Where ranks exchange: six readings of the bf16 logits, 12 bytes each; vectors and partial results beside them."""
    counts = counted(emulator, logits(rows, prototypes, torch.bfloat16), FIRST_OF_TWO)
    elements = rows * prototypes
    sectors = 32 * (counts["global_read_sectors"] + counts["global_written_sectors"])
    requested = counts["global_read_bytes"] + counts["global_written_bytes"]
    splits = min(-(-rows // 128), 64)
    # A column's vectors: maxima and sums written (8), three finishes (36), read by three row steps (12) and two column
    # steps (8), whose sums are written (8). Partial results: pairs once, sums twice, written and read.
    each_column = 72 + (32 * splits if splits > 1 else 0)
    each_row = 3 * 4 + 2 * 4  # potentials written three times, read twice
    most = 12 + each_column / rows + each_row / prototypes
    assert 12 <= sectors / elements <= 1.01 * most
    # Beside that from the caches: a row step reads the columns once for four rows, a column step the potentials for
    # every 16 bytes of logits and the columns for each of a block's eight warps.
    assert requested / elements <= 1.02 * (most + 3 * 4 / 4 + 2 * 4 / 8 + 2 * 4 * 8 * splits / rows)
    assert counts["bank_conflicts"] == 0
    # First step: 4 rows at a time and one exponential to move the maximum; rows: 8 columns at a time. Beside these one
    # for every thread of a row step, and two for every pair of a maximum and a sum that is merged.
    merged = 18 * splits / rows + 3 * (256 + 16) / prototypes
    assert counts["exp2"] / elements <= 1.05 * (1.25 + 3 * 1.125 + 2) + merged


def test_registered_ops_pass_opcheck() -> None:
    ops, given = torch.ops.dinov3_ext_emulator, logits(10, 33, torch.bfloat16)
    torch.library.opcheck(ops.sinkhorn_potentials.default, (given, T, 2))
    torch.library.opcheck(ops.sinkhorn_column_sums.default, (given, T))
    for column_sums in (False, True):
        torch.library.opcheck(ops.sinkhorn_row_sums.default, (given, torch.zeros(10), torch.zeros(33), T, column_sums))
