"""What every op asks a GPU to run: the public functions, called with tensors of any size, on a runtime that writes the
launches down and runs nothing (recorder.cpp). So grids, shared memory and arguments are those of the package's
own launchers, for each architecture, on a machine without a GPU.
"""

import ctypes
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import compiled

HERE = Path(__file__).resolve().parent
RECORDER = HERE / "recorder.cpp"


@dataclass(frozen=True)
class Launch:
    """One kernel start.

    Args:
        case: the call that led to it, e.g. `sinkhorn_knopp bfloat16 128 x 65536`.
        symbol: of the kernel, as in the cubin.
        grid, block: (x, y, z).
        shared: dynamic shared memory of a block, in bytes.
        arguments: bytes of the parameters, at their offsets.
        tensors: address -> bytes of the tensors among them.
    """

    case: str
    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: bytes
    tensors: dict[int, int]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


def all_launches(architecture: int) -> tuple[Launch, ...]:
    """Every launch of every case, as on a GPU of `architecture`."""
    return record("all", compiled.ARCHITECTURES)[architecture]


@functools.cache
def record(which: str, architectures: tuple[int, ...]) -> dict[int, tuple[Launch, ...]]:
    """Launches of the cases `which`, a function of cases.py, by architecture; in a process of its own: the recorder
    takes the place of the emulator's library there."""
    command = [sys.executable, __file__, str(recorder_library()), which, *map(str, architectures)]
    paths = os.pathsep.join([str(compiled.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found: dict[int, list[Launch]] = {architecture: [] for architecture in architectures}
    for architecture, case, lines in json.loads(done.stdout.splitlines()[-1]):
        tensors = {}
        for line in lines:
            symbol, *numbers, data = line.split()
            if symbol == "tensor":
                tensors[int(numbers[0])] = max(tensors.get(int(numbers[0]), 0), int(data))
                continue
            x = [int(number) for number in numbers]
            data = b"" if data == "-" else bytes.fromhex(data)
            launch = Launch(case, symbol, tuple(x[:3]), tuple(x[3:6]), x[6], data, dict(tensors))
            found[architecture].append(launch)
    return {architecture: tuple(launches) for architecture, launches in found.items()}


def recorder_library() -> Path:
    """The recorder with all ops, built unless the cache has it; parameters.txt beside it."""
    lists = [compiled.listed_sources(name) for name in ("cuda_sources", "torch_sources", "cpu_sources")]
    sources = [RECORDER, *(file for source in itertools.chain(*lists) for file in compiled.included(source))]
    import torch

    key = compiled.digest(set(sources), torch.__version__, sys.version)
    return compiled.keep_in_cache("recorder", key, lambda folder: _build(folder, *lists)) / "recorder.so"


def _build(folder: Path, cuda: list[Path], binding: list[Path], cpu: list[Path]) -> None:
    import torch

    torch_root = Path(torch.__file__).parent
    host = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-w", "-DDINOV3_EXT_EMULATOR"]
    host += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020d000000000000", "-DDINOV3_EXT_OPS=dinov3_ext_emulator"]
    host += ["-DDINOV3_EXT_WITH_CUDA", "-Icsrc", f"-isystem{torch_root / 'include'}"]
    host += [f"-isystem{sysconfig.get_paths()['include']}", "-c"]
    # PTX alone: of these objects only the launchers run, and the assembler is what takes time.
    kernels = ["nvcc", "-std=c++20", "-O1", "-Icsrc", "-gencode=arch=compute_90,code=compute_90"]
    kernels += ["-Xcompiler=-fPIC", "-c"]
    work = [(kernels, source) for source in cuda] + [(host, source) for source in [*binding, *cpu, RECORDER]]

    def build(step: tuple[int, tuple[list[str], Path]]) -> Path:
        number, (command, source) = step
        target = folder / f"{number}.o"
        compiled.run([*command, source, "-o", target], cwd=compiled.ROOT)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, enumerate(work)))
    libraries = [torch_root / "lib" / f"lib{name}.so" for name in ("torch_cpu", "c10")]
    compiled.run(["g++", "-shared", "-o", folder / "recorder.so", *objects, *libraries])
    lines = [f"{symbol} {where}" for source in cuda for symbol, where in parameters(source, 90)]
    (folder / "parameters.txt").write_text("\n".join(lines))


def parameters(source: Path, architecture: int) -> Iterator[tuple[str, str]]:
    """(symbol, "ordinal offset size") of every kernel parameter of one source, from the cubin."""
    elf = compiled.compile_cubin(source, architecture).with_suffix(".elf").read_text()
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        for found in re.findall(r"Ordinal : (0x\w+)\s+Offset\s+: (0x\w+)\s+Size\s+: (0x\w+)", part):
            yield part.split(None, 1)[0], " ".join(str(int(word, 16)) for word in found)


# ---- in the process of its own ----


def _main(library: str, which: str, architectures: list[int]) -> None:
    import torch

    from dinov3_ext import _paths

    torch.set_num_threads(1)
    torch.ops.load_library(library)
    recorder = ctypes.CDLL(library)
    recorder.record_lines.restype = ctypes.c_char_p
    for line in (Path(library).parent / "parameters.txt").read_text().splitlines():
        symbol, ordinal, offset, size = line.split()
        recorder.record_parameter(symbol.encode(), int(ordinal), int(offset), int(size))
    now = [0]
    _paths.emulator_loaded(lambda: now[0])
    import cases

    answer = []
    with _paths.use("emulator"):
        for name, run in getattr(cases, which)():
            for now[0] in architectures:
                recorder.record_begin(now[0])
                run()
                answer.append((now[0], name, recorder.record_lines().decode().splitlines()))
    print()
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]])
