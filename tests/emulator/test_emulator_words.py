"""Words of the device vocabulary, as the emulator executes them, against their definitions."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


def matrix_registers(elements: torch.Tensor) -> torch.Tensor:
    """(..., 2) 16-bit elements as int32 registers, the first in the lower half."""
    return elements.contiguous().view(torch.int32).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fragments_of_multiply_add(emulator: ModuleType, dtype: torch.dtype) -> None:
    """Fragments as the PTX ISA's section on mma.m16n8k16 lays them out: element i of lane, group = lane >> 2."""
    left, right = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    a, b = torch.zeros(32, 8, dtype=dtype), torch.zeros(32, 4, dtype=dtype)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
            a[lane, i] = left[row, column]
        for i in range(4):
            b[lane, i] = right[in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group]
    d = torch.ops.dinov3_ext_probes.fragments(
        a.view(32, 4, 2).view(torch.int32).squeeze(-1), b.view(32, 2, 2).view(torch.int32).squeeze(-1),
        dtype == torch.float16,
    )  # fmt: skip
    product = left.double() @ right.double()
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(4):
            row, column = group if i < 2 else group + 8, in_group * 2 + (i & 1)
            assert abs(d[lane, i] - (product[row, column] + 100 * i)) < 16 * 2**-24 * 320  # sums up to 320


def test_matrix_loads(emulator: ModuleType) -> None:
    """Lanes 8 j to 8 j + 7 name the rows of matrix j; lane t gets two elements of row t / 4, or of column t / 4."""
    memory = torch.arange(256, dtype=torch.int16)
    rows = torch.randperm(32)
    registers = torch.ops.dinov3_ext_probes.matrices(memory, (16 * rows).int())
    halves = registers.view(torch.int16).view(2, 32, 4, 2)
    matrices = memory.view(32, 8)[rows].view(4, 8, 8)
    for lane in range(32):
        line, pair = lane // 4, 2 * (lane % 4)
        for j in range(4):
            assert torch.equal(halves[0, lane, j], matrices[j, line, pair : pair + 2])
            assert torch.equal(halves[1, lane, j], matrices[j, pair : pair + 2, line])


def all_floats() -> torch.Tensor:
    """Every bf16 and fp16 number, what lies half-way between neighbours, just off it, and random bits."""
    bits = torch.arange(65536, dtype=torch.int32)
    bfloat16 = (bits << 16).view(torch.float32)
    half = bits.to(torch.int16).view(torch.float16).float()
    middle = (half[:-1] + half[1:]) / 2
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (20000,), generator=generator, dtype=torch.int64).int().view(torch.float32)
    between = ((bits << 16) + 0x8000).view(torch.float32)
    around = [torch.nextafter(x, torch.tensor(sign * torch.inf)) for x in (middle, between) for sign in (1, -1)]
    return torch.cat([bfloat16, half, middle, between, *around, random])


@pytest.mark.parametrize(("which", "dtype"), [(0, torch.bfloat16), (1, torch.bfloat16), (2, torch.float16),
                                              (3, torch.float16), (4, torch.bfloat16), (5, torch.float16)])  # fmt: skip
def test_rounding_to_sixteen_bits(emulator: ModuleType, which: int, dtype: torch.dtype) -> None:
    x = all_floats()
    got, expected = torch.ops.dinov3_ext_probes.numbers(x, which), x.to(dtype).float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()])
    assert torch.equal(got[~got.isnan()].signbit(), expected[~got.isnan()].signbit())


@pytest.mark.parametrize(
    ("which", "function", "tolerance"),
    [(6, torch.exp2, 2**-22), (7, torch.log2, 2**-22), (8, torch.reciprocal, 2**-23), (9, torch.rsqrt, 2**-22)],
)
def test_functions(emulator: ModuleType, which: int, function: Callable, tolerance: float) -> None:
    x = torch.linspace(-120, 120, 5001) if which == 6 else torch.logspace(-30, 30, 5001)
    got, expected = torch.ops.dinov3_ext_probes.numbers(x, which).double(), function(x.double())
    assert ((got - expected).abs() <= tolerance * expected.abs().clamp(min=1 if which == 7 else 0)).all()


def test_functions_at_the_edges(emulator: ModuleType) -> None:
    infinity, subnormal = torch.inf, 1e-40

    def word(which: int, *x: float) -> list[float]:
        return torch.ops.dinov3_ext_probes.numbers(torch.tensor(x), which).tolist()

    assert word(6, -infinity, -127.0, -126.0, 128.0, 0.0) == [0.0, 0.0, 2.0**-126, infinity, 1.0]
    assert word(7, 0.0, subnormal, 1.0, infinity) == [-infinity, -infinity, 0.0, infinity]
    assert torch.tensor(word(8, 0.0, subnormal, infinity)).isnan().all()  # the Newton step: 0 * inf
    assert torch.tensor(word(9, 0.0, infinity, -1.0)).isnan().all()
