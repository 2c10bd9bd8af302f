"""Counters on kernels with known counts; schedules that a seed reproduces; results that no order changes."""

from types import ModuleType

import pytest
import torch

probes = torch.ops.dinov3_ext_probes


def count(emulator: ModuleType) -> dict[str, int]:
    (counts,) = emulator.counters().values()
    return counts


@pytest.mark.parametrize(
    ("stride", "size", "passes"),
    [
        (2, 2, 1),  # two lanes share a word
        (4, 4, 1),
        (8, 4, 2),
        (16, 4, 4),
        (128, 4, 32),
        (132, 4, 1),
        (0, 4, 1),  # a broadcast
        (8, 8, 2),  # two halves of the warp
        (16, 8, 4),
        (16, 16, 4),  # four quarters
        (32, 16, 8),
        (128, 16, 32),
        (144, 16, 4),
    ],
)
def test_bank_conflicts(emulator: ModuleType, stride: int, size: int, passes: int) -> None:
    emulator.configure(races=False)
    probes.strided(torch.zeros(1), stride, size)
    counts = count(emulator)
    fewest = max(1, size // 4)
    assert counts["wavefronts"] == 2 * passes
    assert counts["bank_conflicts"] == 2 * (passes - fewest)
    assert counts["shared_read_bytes"] == counts["shared_written_bytes"] == 32 * size


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (16, 32), (0, 1)])
def test_counts_of_a_small_kernel(emulator: ModuleType, stride: int, sectors: int, threads: int) -> None:
    emulator.configure(threads=threads)
    from_ = torch.zeros(32 * 16 + 8)
    from_ = from_[(-from_.data_ptr() // 4) % 8 :]  # begins a sector
    probes.gather(from_, 5, stride)
    assert count(emulator) == {
        **dict.fromkeys(count(emulator), 0),
        "launches": 1,
        "blocks": 5,
        "global_read_bytes": 5 * 32 * 4,
        "global_read_transactions": 5 * sectors,
        "global_read_sectors": sectors,  # the same for all blocks
        "global_written_bytes": 5 * 4,
        "global_write_transactions": 5,
        "global_written_sectors": 1,
        "shuffles": 5 * 5,
        "exp2": 5,
    }


def test_counts_of_barriers_and_copies(emulator: ModuleType) -> None:
    probes.rotate(torch.zeros(3, 64))
    counts = count(emulator)
    assert counts["block_barriers"] == 3 * 4 * 2
    assert counts["warp_barriers"] == 3 * 4 * 2 * 2
    emulator.reset_counters()
    assert emulator.counters() == {}
    probes.pipeline(torch.zeros(7, 256))
    counts = count(emulator)
    assert counts["block_barriers"] == 7
    assert counts["copy_async_bytes"] == 9 * 1024
    assert counts["global_read_bytes"] == 7 * 1024
    assert counts["copy_async_conflicts"] == counts["bank_conflicts"] == 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("copies", ["late", "now"])
def test_results_depend_on_no_order(emulator: ModuleType, copies: str, threads: int) -> None:
    rows, steps = torch.randn(9, 64), torch.randn(10, 256)
    expected = rows.double()
    total = expected.clone()
    for _ in range(4):
        expected = expected.roll(-32, 1)
        total += expected
        expected = expected.view(9, 2, 32).roll(-1, 2).view(9, 64)
        total += expected
    results = []
    for seed in range(20):
        emulator.configure(seed=seed, cp_async=copies, threads=threads)
        results.append((probes.rotate(rows), probes.pipeline(steps), probes.reduce(rows)))
    assert torch.allclose(results[0][0].double(), total, atol=1e-4)
    assert torch.allclose(results[0][1].double(), steps.double().sum(0), atol=1e-4)
    assert torch.allclose(
        results[0][2].double(), torch.stack([rows.double().sum(1), rows.double().amax(1)], 1), atol=1e-5
    )
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_a_seed_is_a_schedule(emulator: ModuleType) -> None:
    """The order of threads and blocks, seen through a race on purpose."""

    def order(seed: int) -> list[int]:
        emulator.configure(seed=seed, races=False)
        return probes.order(torch.zeros(1), 6).tolist()

    in_order = [64 * block + thread for block in range(6) for _ in range(2) for thread in range(64)]
    assert sorted(order(0)) == sorted(in_order)
    orders = {tuple(order(seed)) for seed in range(8)}
    assert len(orders) == 8
    for seed in range(8):
        assert order(seed) == order(seed)
    blocks = [order(3)[128 * i] // 64 for i in range(6)]
    assert sorted(blocks) == list(range(6))
    assert blocks != list(range(6))


def test_settings_are_checked(emulator: ModuleType) -> None:
    with pytest.raises(ValueError, match='cp_async must be "late" or "now"'):
        emulator.configure(cp_async="soon")
    with pytest.raises(ValueError, match='products must be "nearest" or "truncated"'):
        emulator.configure(products="exact")
    with pytest.raises(ValueError, match="threads must be"):
        emulator.configure(threads=0)
    with pytest.raises(ValueError, match="site must be file:line:column"):
        emulator.mutate("somewhere")
