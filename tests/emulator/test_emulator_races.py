"""The race detector against every pair of accesses of random programs, and reports of one mistake each."""

import re
from types import ModuleType

import pytest
import torch

NOTHING, READ, WRITE, WARP_BARRIER, BLOCK_BARRIER = range(5)
THREADS, BYTES = 96, 256


def random_program(generator: torch.Generator, steps: int, accesses: float) -> torch.Tensor:
    """(steps, threads, 3): each thread mostly keeps to its own few bytes, so that about half of the programs race."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    program = torch.zeros(steps, THREADS, 3, dtype=torch.int32)
    for step in range(steps):
        if draw(3) == 0:
            program[step, :, 0] = BLOCK_BARRIER
            continue
        for warp in range(THREADS // 32):
            lanes = range(32 * warp, 32 * warp + 32)
            if draw(3) == 0:
                program[step, lanes, 0] = WARP_BARRIER
                continue
            for thread in lanes:
                if draw(1000) < 1000 * accesses:
                    size = (2, 4, 8, 16)[draw(4)]
                    address = draw(BYTES // size) * size
                    program[step, thread] = torch.tensor([READ if draw(4) else WRITE, address, size])
    return program


def races(program: torch.Tensor) -> bool:
    """Whether two accesses of different threads to one byte, one of them a write, have no barrier between them."""
    seen: dict[int, list[tuple[int, bool, int, int]]] = {}
    block_epoch, warp_epoch = 0, [0] * (THREADS // 32)
    for step in program.tolist():
        if step[0][0] == BLOCK_BARRIER:
            block_epoch += 1
            continue
        for thread, (kind, address, size) in enumerate(step):
            if kind == WARP_BARRIER and thread % 32 == 0:
                warp_epoch[thread // 32] += 1
            if kind not in (READ, WRITE):
                continue
            for byte in range(address, address + size):
                for other, wrote, block, warp in seen.setdefault(byte, []):
                    ordered = block != block_epoch or (other // 32 == thread // 32 and warp != warp_epoch[thread // 32])
                    if other != thread and (wrote or kind == WRITE) and not ordered:
                        return True
                seen[byte].append((thread, kind == WRITE, block_epoch, warp_epoch[thread // 32]))
    return False


@pytest.mark.parametrize("accesses", [0.015, 0.025, 0.04])
def test_random_programs(emulator: ModuleType, accesses: float) -> None:
    generator = torch.Generator().manual_seed(int(accesses * 1000))
    found = 0
    for case in range(100):
        program = random_program(generator, 12, accesses)
        expected = races(program)
        found += expected
        for seed in (0, case + 1):
            emulator.configure(seed=seed)
            if expected:
                with pytest.raises(RuntimeError, match="race in interpret_kernel"):
                    torch.ops.dinov3_ext_probes.interpret(program)
            else:
                torch.ops.dinov3_ext_probes.interpret(program)
    assert 10 <= found <= 95, f"{found} of 100 programs race: the draw is too easy"


MISTAKES = {
    1: r"race in faulty_kernel.* writes 4 bytes of shared memory at byte 4 that thread 0 \(warp 0, lane 0\) reads"
    r"|out of bounds in ",
    2: r"out of bounds in faulty_kernel, block \(0, 0, 0\), thread 0 \(warp 0, lane 0\), "
    r"tests/emulator/probe_kernels.cpp:\d+: reads 4 bytes of shared memory at byte 256; the block has 256",
    3: r"out of bounds in .*: reads 4 bytes of shared memory at byte -1024",
    4: r"misaligned in .*: reads 8 bytes of shared memory at byte 4",
    5: r"out of bounds in .* load_global of 4 bytes at 0x.*, byte 512 of the nearest tensor "
    r"\(0x.*, 512 bytes, read-only",
    6: r"out of bounds in .* load_global of 4 bytes at 0x.*, byte -4 of the nearest tensor",
    7: r"read-only memory in .* store_global of 4 bytes at byte 0 of a tensor of 512 bytes that is input only",
    8: r"misaligned in .* load_global of 16 bytes of global memory at",
    9: r"divergent collective in .*: returns, while other lanes of the warp are in shuffle_xor",
    10: r"divergent collective in .* shuffle, while other lanes of the warp are in shuffle_xor at tests"
    r"|divergent collective in .* shuffle_xor, while other lanes of the warp are in shuffle at tests",
    11: r"deadlock in .*; 0 of 64 threads have returned",
    12: r"divergent barrier in .* block_barrier, while other threads of the block are in that at tests",
    13: r"global race in .* store_global of 4 bytes at byte \d+ of a tensor: another block writes it too",
    14: r"global race in .*: another thread writes it too, with no block barrier between them",
    15: r"global race in .*: another block (writes|reads) it",
    16: r"global race in .* load_global of 4 bytes .* this launch writes it; load_global promises that nobody does",
    19: r"misaligned in .* copy_async reads 16 bytes of global memory at",
    20: r"race in .* to which a copy_async of thread \d+ .* is under way|race in .* writes 16 bytes of shared memory",
    23: r"divergent collective in .*: returns, while other lanes of the warp are in shuffle_xor"
    r"|divergent collective in .* shuffle_xor by a warp whose lane 31 has returned",
    24: r"race in .* reads 4 bytes of shared memory at byte \d+ that thread \d+ .* writes|"
    r"race in .* writes 4 bytes of shared memory at byte \d+ that thread \d+ .* reads",
    25: r"race in ",
    26: r"race in ",
    28: r"race in .* writes 4 bytes of shared memory at byte 0 that thread 32 \(warp 1, lane 0\) reads, with no "
    r"barrier between them; its last barrier or wait: warp_barrier at tests/emulator/probe_kernels.cpp:\d+$"
    r"|race in .* reads 4 bytes of shared memory at byte 0 that thread 0 ",
    29: r"race in .* reads 16 bytes of shared memory",
    30: r"plain pointer in faulty_kernel, block \(0, 0, 0\), thread 0 .*: follows a plain pointer \(null, or",
    31: r"plain pointer in ",
    32: r"plain pointer in ",
    33: r"stack overflow in faulty_kernel, .* need more than 262144 bytes",
}
ALLOWED = [0, 17, 18, 21, 22, 27]


def run(mistake: int) -> torch.Tensor:
    writable = torch.full((128,), 3.0)
    torch.ops.dinov3_ext_probes.faulty(torch.zeros(128), writable, mistake)
    return writable


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported(emulator: ModuleType, mistake: int, seed: int) -> None:
    emulator.configure(seed=seed)
    with pytest.raises(RuntimeError) as raised:
        run(mistake)
    report = emulator.last_report()
    assert report in str(raised.value)
    if seed == 0:
        assert re.search(MISTAKES[mistake], report), report
    else:  # another thread may be the first to meet it
        kinds = re.findall(r"(?:^|\|)([a-z -]+) in ", MISTAKES[mistake])
        assert report.split(" in ")[0] in kinds, report
    assert run(0).eq(1).all()  # the next launch works


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mistake", ALLOWED)
def test_what_is_allowed_is_not_reported(emulator: ModuleType, mistake: int, threads: int, seed: int) -> None:
    emulator.configure(seed=seed, threads=threads)
    run(mistake)


@pytest.mark.parametrize("mistake", [13, 15])
def test_blocks_of_two_workers_race(emulator: ModuleType, mistake: int) -> None:
    emulator.configure(threads=2)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="global race"):
            run(mistake)


def test_shared_memory_that_nobody_wrote_is_nan(emulator: ModuleType) -> None:
    result = torch.ops.dinov3_ext_probes.unwritten(torch.zeros(1))
    assert result[:16].eq(0).all()
    assert result[16:].isnan().all()  # 16 of shared memory, 32 of an output that nobody wrote


@pytest.mark.parametrize(
    "shape", [(1, 1, 31, 0), (1, 1, 1056, 0), (1, 65536, 32, 0), (1, 1, 32, 300000), (2**31, 1, 32, 0)]
)
def test_launches_that_no_gpu_takes(emulator: ModuleType, shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="invalid launch of unwritten_kernel"):
        torch.ops.dinov3_ext_probes.shape(torch.zeros(1), *shape)


def test_a_finding_leaves_nothing_behind(emulator: ModuleType) -> None:
    for _ in range(300):
        with pytest.raises(RuntimeError, match="deadlock"):
            run(11)
    assert run(0).eq(1).all()
