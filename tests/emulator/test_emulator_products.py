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
