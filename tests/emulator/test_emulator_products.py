"""Tensor-core words of the emulator against numpy-like products, and whole tiles against lane by lane."""

from types import ModuleType

import pytest
import torch

# (left tiles, right tiles, depth) of csrc/core/tile.cuh's products: MT, NT, KT
SHAPES = [(1, 4, 2), (1, 8, 4), (2, 8, 4), (1, 16, 8), (4, 8, 4), (2, 16, 4)]


@pytest.mark.parametrize("products", ["nearest", "truncated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_tiles_equal_lane_by_lane(
    emulator: ModuleType, shape: tuple[int, int, int], rows: bool, dtype: torch.dtype, products: str
) -> None:
    mt, nt, kt = shape
    left = torch.randn(16 * mt, 16 * kt).to(dtype)
    right = torch.randn((8 * nt, 16 * kt) if rows else (16 * kt, 8 * nt)).to(dtype)
    results, counts = [], []
    for whole_tiles in (True, False):
        emulator.configure(whole_tiles=whole_tiles, products=products)
        emulator.reset_counters()
        results.append(torch.ops.dinov3_ext_probes.product(left, right, rows))
        counts.append(emulator.counters())
    assert torch.equal(*results)
    assert counts[0] == counts[1]
    expected = left.double() @ (right.double().T if rows else right.double())
    bound = left.double().abs() @ (right.double().abs().T if rows else right.double().abs())
    assert ((results[0] - expected).abs() <= 16 * kt * 2**-24 * bound).all()
    (count,) = counts[0].values()
    assert count["mma"] == mt * nt * kt
    assert count["ldmatrix"] == mt * kt + kt * nt // 2
    assert count["bank_conflicts"] == 0
    assert count["wavefronts"] == 4 * count["ldmatrix"] + count["copy_async_bytes"] // 128
    assert count["copy_async_bytes"] == count["global_read_bytes"] == 2 * (left.numel() + right.numel())
    assert count["global_read_sectors"] == count["global_read_bytes"] // 32
    assert count["global_written_bytes"] == 4 * expected.numel()


def truncated(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right^T in fp32, eight products at a time added exactly and cut off towards zero."""
    total = torch.zeros(len(left), len(right))
    for k in range(0, left.shape[1], 8):
        exact = total.double() + left[:, k : k + 8].double() @ right[:, k : k + 8].double().T
        total = exact.float()
        total = torch.where(total.double().abs() > exact.abs(), torch.nextafter(total, torch.zeros(())), total)
    return total


def test_sums_that_are_cut_off(emulator: ModuleType) -> None:
    left, right = torch.randn(16, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    emulator.configure(products="truncated")
    result = torch.ops.dinov3_ext_probes.product(left, right, True)
    assert torch.equal(result, truncated(left, right))
    emulator.configure()
    assert not torch.equal(torch.ops.dinov3_ext_probes.product(left, right, True), result)
    # Positive numbers only: cutting off pulls every sum down.
    left, right = left.abs(), right.abs()
    emulator.configure(products="truncated")
    result = torch.ops.dinov3_ext_probes.product(left, right, True).double()
    assert (result <= left.double() @ right.double().T).all()


@pytest.mark.parametrize("rows", [True, False])
def test_operands_in_registers(emulator: ModuleType, rows: bool) -> None:
    left, right = torch.randn(64, 32).bfloat16(), torch.randn(64, 64).bfloat16()
    results, counts = [], []
    for whole_tiles in (True, False):
        emulator.configure(whole_tiles=whole_tiles)
        emulator.reset_counters()
        results.append(torch.ops.dinov3_ext_probes.operands(left, right, rows))
        counts.append(emulator.counters())
    assert torch.equal(*results)
    assert counts[0] == counts[1]
    (count,) = counts[0].values()
    assert count["mma"] == 2 * 8 * 4
    assert count["ldmatrix"] == 2 * 4 + 4 * 4
    assert count["bank_conflicts"] == 0
    # The same bits as the product from the tile: one order of sums.
    emulator.configure()
    assert torch.equal(results[0], torch.ops.dinov3_ext_probes.product(left.T.contiguous(), right, rows))


@pytest.mark.parametrize("columns", [32, 64, 128, 192, 256])
def test_tiles_are_permuted_without_bank_conflicts(emulator: ModuleType, columns: int) -> None:
    """Every chunk has a place of its own within its row; any aligned 8 rows or 8 chunks of a row meet all banks."""
    rows, chunks = 64, columns // 8
    generator = torch.Generator().manual_seed(columns)
    for _ in range(10):
        row = 16 * int(torch.randint(rows // 16, (), generator=generator))
        column = 16 * int(torch.randint(columns // 16, (), generator=generator))
        everything = torch.ops.dinov3_ext_probes.addresses(torch.zeros(1), columns, rows, row, column)
        places = (everything[: rows * chunks].view(rows, chunks) - 1024) // 16
        assert torch.equal((everything[: rows * chunks] - 1024) % 16, torch.zeros(rows * chunks, dtype=torch.int32))
        assert torch.equal(places.flatten().sort().values, torch.arange(rows * chunks, dtype=torch.int32))
        assert (places // chunks == torch.arange(rows)[:, None]).all()
        for phase in places.view(rows // 8, 8, chunks).transpose(1, 2).reshape(-1, 8):  # one chunk of eight rows
            assert len(set((phase % 8).tolist())) == 8
        if columns >= 64:
            for phase in places.view(-1, 8):  # eight chunks of one row
                assert len(set((phase % 8).tolist())) == 8
        lanes = (everything[rows * chunks :].view(4, 4, 8) - 1024) // 16  # operand, matrix, line
        assert all(len(set((phase % 8).tolist())) == 8 for phase in lanes.view(16, 8))
        # What the lanes name is the 16 x 16 part at (row, column), each chunk once, in the order of the fragments.
        part = places[row : row + 16, column // 8 : column // 8 + 2]  # (16, 2)
        by_rows = torch.stack([part[:8, 0], part[8:, 0], part[:8, 1], part[8:, 1]])
        by_chunks = torch.stack([part[:8, 0], part[:8, 1], part[8:, 0], part[8:, 1]])
        assert torch.equal(lanes[0], by_rows)
        assert torch.equal(lanes[1], by_chunks)
        assert torch.equal(lanes[2], by_chunks)
        assert torch.equal(lanes[3], by_rows)
