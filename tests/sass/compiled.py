"""Compiles the kernels for GPUs that need not be here, and reads back what the compiler made of them.

Each .cu of CMakeLists.txt's `cuda_sources` is compiled alone, as a file that needs no torch and no Python, into one
cubin per architecture. Cubins and their disassembly stay in build/sass/<digest of everything the file includes>, so
that a second run compiles nothing.
"""

import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from control_flow import Instruction, read_instructions

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "sass"
ARCHITECTURES = (80, 90, 120)
FLAGS = ("-std=c++20", "-O3", "-Icsrc", "--resource-usage")
ELEMENTS = ("float32", "bfloat16", "float16")  # csrc/core/element.h
TOOLS = {"cuobjdump": "nvidia-cuda-cuobjdump", "nvdisasm": "nvidia-cuda-nvdisasm"}


@dataclass(frozen=True)
class Kernel:
    """One entry of one cubin.

    Args:
        symbol: as in the cubin.
        name: for people, e.g. `column_partial<bfloat16, 8>`.
        op: folder below csrc/ops.
        architecture: 80, 90, 120.
        registers: of a thread.
        stack, spill_stores, spill_loads: bytes of a thread.
        static_shared: bytes of a block, without what the launch asks for.
        threads: most threads of a block that `__launch_bounds__` promised; 1024 where it is silent.
        instructions: in order of address.
    """

    symbol: str
    name: str
    op: str
    architecture: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int
    threads: int
    instructions: tuple[Instruction, ...]

    def count(self, pattern: str, *, loops_only: bool = False) -> int:
        """Instructions whose opcode matches from its start."""
        match = re.compile(pattern).match
        return sum(bool(match(i.opcode)) for i in self.instructions if i.in_loop or not loops_only)


def missing_tool() -> str | None:
    """Why nothing can be compiled or read here; None where everything is there."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    for tool, distribution in TOOLS.items():
        if tool_path(tool) is None:
            return f"{tool} is not installed (pip install {distribution})"
    return None


@functools.cache
def tool_path(name: str) -> str | None:
    """One of NVIDIA's disassemblers: from its package, else from PATH."""
    try:
        for file in importlib.metadata.files(TOOLS[name]) or []:
            if file.name == name and os.access(file.locate(), os.X_OK):
                return str(file.locate())
    except importlib.metadata.PackageNotFoundError:
        pass
    return shutil.which(name)


def listed_sources(variable: str) -> list[Path]:
    """The files of one list of CMakeLists.txt, e.g. `cuda_sources`."""
    match = re.search(rf"set\({variable}\s+([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert match, f"CMakeLists.txt has no list {variable}"
    return [ROOT / name for name in match.group(1).split() if not name.startswith("#")]


def included(source: Path) -> set[Path]:
    """`source` and every file of csrc that it includes, directly or not."""
    found, waiting = set(), [source]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', file.read_text(), re.MULTILINE):
            waiting += [path for path in (ROOT / "csrc" / name, file.parent / name) if path.is_file()]
    return found


def digest(files: Iterable[Path], *words: str) -> str:
    """Changes when a file's name or content, a word or the compiler changes."""
    state = hashlib.sha256(repr((words, _compiler_version())).encode())
    for file in sorted(files):
        state.update(str(file).encode() + b"\0" + file.read_bytes())
    return state.hexdigest()[:16]


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def run(command: list[object], **options: object) -> str:
    """Output of a command; its messages in the error when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(str(word) for word in command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_cubin(source: Path, architecture: int) -> Path:
    """The cubin of one source, compiled unless the cache has it; beside it .log (ptxas), .sass and .elf (as text)."""
    key = digest(included(source), str(architecture), *FLAGS)
    folder = CACHE / f"{source.stem}-sm_{architecture}-{key}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=CACHE))
        cubin = work / "kernels.cubin"
        log = run(["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", source, "-o", cubin], cwd=ROOT)
        (work / "kernels.log").write_text(log)
        (work / "kernels.sass").write_text(run([tool_path("nvdisasm"), "-c", cubin]))
        (work / "kernels.elf").write_text(run([tool_path("cuobjdump"), "-elf", cubin]))
        _keep(work, folder, f"{source.stem}-sm_{architecture}-*")
    return folder / "kernels.cubin"


def _keep(work: Path, folder: Path, older: str) -> None:
    """Renames a finished folder into the cache, in place of what earlier sources left there."""
    for old in CACHE.glob(older):
        shutil.rmtree(old, ignore_errors=True)
    try:
        work.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(work)


def keep_in_cache(name: str, key: str, build) -> Path:
    """build/sass/NAME-KEY, made by `build(folder)` unless it is there; older ones of that name go."""
    folder = CACHE / f"{name}-{key}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=CACHE))
        build(work)
        _keep(work, folder, f"{name}-*")
    return folder


def kernels_of(source: Path, architecture: int) -> list[Kernel]:
    """Every entry of one source for one architecture."""
    cubin = compile_cubin(source, architecture)
    log, sass, elf = (cubin.with_suffix(suffix).read_text() for suffix in (".log", ".sass", ".elf"))
    usage, bodies, bounds = _resource_usage(log), read_instructions(sass), _launch_bounds(elf)
    assert usage.keys() == bodies.keys(), f"{source}: ptxas and nvdisasm name different entries"
    names = short_names(usage)
    return [
        Kernel(
            symbol, names[symbol], source.parent.name, architecture, **usage[symbol],
            threads=bounds.get(symbol, 1024), instructions=bodies[symbol],
        )
        for symbol in sorted(usage, key=names.get)
    ]  # fmt: skip


@functools.cache
def all_kernels(architecture: int) -> tuple[Kernel, ...]:
    """Every entry of every listed source, compiled two at a time."""
    sources = listed_sources("cuda_sources")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: compile_cubin(source, architecture), sources))
    return tuple(kernel for source in sources for kernel in kernels_of(source, architecture))


def _resource_usage(log: str) -> dict[str, dict[str, int]]:
    """symbol -> what ptxas says of it."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        symbol = part[: part.index("'")]
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        found[symbol] = {
            "registers": int(re.search(r"Used (\d+) registers", part).group(1)),
            "stack": int(stack),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "static_shared": int(shared.group(1)) if shared else 0,
        }
    return found


def _launch_bounds(elf: str) -> dict[str, int]:
    """symbol -> threads of __launch_bounds__, from the cubin's attributes."""
    found = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", part)
        if bound:
            x, y, z = (int(word, 16) for word in bound.groups())
            found[part.split(None, 1)[0]] = x * y * z
    return found


def short_names(symbols: Iterable[str]) -> dict[str, str]:
    """Mangled -> `name<arguments>`, without namespaces, casts and parameters."""
    symbols = list(symbols)
    plain = run(["c++filt"], input="\n".join(symbols)).splitlines()
    return {symbol: short_name(text) for symbol, text in zip(symbols, plain)}


def short_name(text: str) -> str:
    """`void dinov3_ext::k<(dinov3_ext::Element)1, 8>(dinov3_ext::Arguments)` -> `k<bfloat16, 8>`."""
    text = re.sub(r"\(dinov3_ext::Element\)(\d)", lambda m: ELEMENTS[int(m.group(1))], text)
    text = text.replace("(anonymous namespace)::", "").replace("dinov3_ext::", "")
    text = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", text).removeprefix("void ")
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:position]
    return text


if __name__ == "__main__":
    print(missing_tool() or "nvcc and both disassemblers are here", file=sys.stderr)
