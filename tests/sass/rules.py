"""What must hold of every kernel's machine code and of every launch. Each rule answers with sentences; none is good."""

import re
from collections.abc import Iterator, Sequence

from compiled import Kernel
from launches import Launch
from occupancy import Block, blocks_per_multiprocessor

REGISTERS = 65536  # of a multiprocessor
SHARED = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # most a block may have
RESERVED_SHARED = 1024  # of each block, by the driver, on top
FEWEST_WARPS = 8  # on a multiprocessor at a time: two for each of its four schedulers
# Kernels that may have fewer: pattern of the name -> (warps, why).
FEWER_WARPS: dict[str, tuple[int, str]] = {
    r"backward_resident<\w+, 128, 1, 16, 9, false>": (5, "99 KB hold one block of 65 tokens, 5 of one token"),
    r"resident_forward<\w+, 128, 1>": (5, "one block: 201 tokens in 163 KB make 7 warps, 65 tokens in 99 KB make 5"),
}

# Kernels that must use the tensor cores, by op: pattern of the name.
TENSOR_CORES = {
    "rope_attention": r"(?!.*(delta|rotate|prepare|preprocess|combine)).*attention.*",
    "gram_loss": r".*(similarit|product|tile|gradient).*",
}
# Ops that multiply fp16 numbers, whatever the type of their tensors.
FLOAT16_PRODUCTS = ("gram_loss",)
# Kernels whose last template argument says how many elements a thread takes at a time: 16 bytes need wide loads.
VECTOR = re.compile(r"<(bfloat16|float16|float32),.*?(\d+)>$")


def machine_code(kernel: Kernel, *, launched: bool = True) -> Iterator[str]:
    """Rules of one kernel, whatever it is launched with. launched: whether any shape is dispatched to it on this
    architecture; where none is, its registers may spill."""
    k = kernel
    if launched and (k.stack or k.spill_stores or k.spill_loads):
        yield f"stack {k.stack} bytes, spills {k.spill_stores} stored, {k.spill_loads} loaded"
    if k.registers * k.threads > REGISTERS:
        yield f"{k.registers} registers x {k.threads} threads do not fit {REGISTERS}"
    for opcodes, what in FORBIDDEN.items():
        if (what == LOCAL and not launched) or (what == DOUBLE and re.match(DOUBLES, k.name)):
            continue
        if count := k.count(opcodes):
            yield f"{count} x {what}"
    # A call of the compiler's own function; a CALL to a label is only a jump, with which ptxas leaves some loops, and
    # those named ...sync... stand behind a test whether the warp has come apart, which it has not.
    slow = re.compile(r"\$(?!.*sync_)")
    if count := sum(i.opcode.startswith("CALL") and slow.search(i.operands) is not None and i.in_loop
                    for i in k.instructions):  # fmt: skip
        yield f"{count} calls inside a loop: a division or root with a slow path"
    if guards := sum(i.opcode.startswith("FSETP") and re.search(r", -126\b", i.operands) is not None
                     for i in k.instructions):  # fmt: skip
        yield f"{guards} guards of exp2 against subnormal numbers: use exp2_approx"
    yield from tensor_cores(k)
    yield from wide_accesses(k)


LOCAL, DOUBLE = "local memory", "double precision"
# The logarithm of a row's sum is a double, once a row: assignment_cross_entropy.h says why.
DOUBLES = r"cross_entropy::(backward<|forward_rows)"
FORBIDDEN = {
    r"(LDL|STL)\b": LOCAL,
    r"(REDG?|REDAS|ATOM[GS]?)\b": "atomics: their order would change results",
    r"(DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w*64H)|\w+\.F64": DOUBLE,
    r"BRX|JMX": "jumps to a computed place",
    r"LDSM(?!\.16\.MT?88\.4\b)": "matrix loads of less than four matrices",
    r"LDGSTS(?!.*BYPASS.*128)": "asynchronous copies that are not 16 bytes past the L1 cache",
    r"HMMA(?!\.16816\.F32)": "matrix products that are not 16 x 8 x 16 with fp32 sums",
}


def tensor_cores(k: Kernel) -> Iterator[str]:
    products = k.count("HMMA")
    if (pattern := TENSOR_CORES.get(k.op)) and re.fullmatch(pattern, k.name) and not products:
        yield "no HMMA in a kernel that multiplies matrices"
    if not products:
        return
    rounded = k.count(r"HMMA\.16816\.F32\.BF16")
    if rounded and (k.op in FLOAT16_PRODUCTS or ("float16" in k.name and "bfloat16" not in k.name)):
        yield f"{rounded} bfloat16 products in a float16 kernel"
    if ("bfloat16" in k.name or "float32" in k.name) and rounded != products:
        yield f"{products - rounded} of {products} products are not bfloat16"
    if not k.count("LDSM"):
        yield "HMMA without LDSM"
    if scalar := k.count(r"LDS\.[US]16|LDS\.[US]8", loops_only=True):
        yield f"{scalar} loads of single elements from shared memory inside loops of a matrix kernel"


def wide_accesses(k: Kernel) -> Iterator[str]:
    match = VECTOR.search(k.name)
    if match and int(match[2]) * (4 if match[1] == "float32" else 2) == 16 and not k.count("HMMA"):
        if not k.count(r"LDG\.E.*\.128"):
            yield "no 16-byte load in a vector kernel"
        narrow = k.count(r"LDG\.E\.(U|S)(8|16)", loops_only=True)
        if narrow:
            yield f"{narrow} loads of single elements inside loops of a vector kernel"


def fits(launches: Sequence[Launch], kernels: Sequence[Kernel], architecture: int) -> Iterator[str]:
    """Rules of launches: threads as promised, shared memory and occupancy of that architecture."""
    by_symbol = {kernel.symbol: kernel for kernel in kernels}
    cases: dict[tuple[str, int, int], str] = {}
    for launch in launches:
        if launch.symbol not in by_symbol:
            yield f"{launch.case}: launches {launch.symbol}, which no cubin has"
            continue
        cases.setdefault((launch.symbol, launch.threads, launch.shared), launch.case)
    shapes = [
        Block(architecture, threads, by_symbol[symbol].registers, by_symbol[symbol].static_shared, shared)
        for symbol, threads, shared in cases
    ]
    for (key, case), block, count in zip(cases.items(), shapes, blocks_per_multiprocessor(shapes)):
        kernel = by_symbol[key[0]]
        where = f"{kernel.name} ({case})"
        if block.threads > kernel.threads:
            yield f"{where}: {block.threads} threads, __launch_bounds__ {kernel.threads}"
        if block.static_shared + block.dynamic_shared > SHARED[architecture]:
            yield f"{where}: {block.static_shared + block.dynamic_shared} bytes of shared memory"
        fewest = next((n for p, (n, _) in FEWER_WARPS.items() if re.fullmatch(p, kernel.name)), FEWEST_WARPS)
        if count * block.warps < fewest:
            yield f"{where}: {count} blocks of {block.warps} warps a multiprocessor, fewer than {fewest} warps"
