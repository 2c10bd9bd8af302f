"""Before a release, by hand: a static verifier proves the PTX of every kernel free of races, for one small launch each.

    pip install sentryward
    python benchmarks/static_races.py [--only PATTERN] [--timeout SECONDS] [--mutants] [--case small]

The launch and its arguments are those that the public functions make (tests/sass/launches.py); which of the argument
bytes are pointers is known from the tensors that were handed over, and where the kernel reads them from its PTX. The
PTX is that of sm_120, the only portable architecture the verifier knows. Prints race_free, potential_race, unsupported
or timeout per kernel; a kernel that branches on data is checked for one side of each such branch, and the line says so.
`--mutants` also removes each barrier and each wait of a kernel in turn, until one of these copies is rejected: a
verifier that never says no proves nothing.
"""

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "sass")]

import compiled  # noqa: E402
import launches  # noqa: E402

ARCHITECTURE = 120
LOAD = re.compile(r"ld\.param\.(?:v(\d)\.)?([bfsu])(8|16|32|64)\s+\{?[^[]*\[(%?\w+?)(?:\+(\d+))?\]")
FINITE = 3.4028234663852886e38
ORDERS_MEMORY = re.compile(r"^[ \t]*(?:bar\.|barrier\.|cp\.async\.wait|bar\.warp)[^;]*;", re.MULTILINE)


def entries(source: Path) -> dict[str, str]:
    """symbol -> PTX file with that entry alone."""
    key = compiled.digest(compiled.included(source), "ptx", str(ARCHITECTURE), *compiled.FLAGS)

    def build(folder: Path) -> None:
        flags = [flag for flag in compiled.FLAGS if flag != "--resource-usage"]
        command = ["nvcc", *flags, f"-arch=sm_{ARCHITECTURE}", "-ptx", source, "-o", folder / "kernels.ptx"]
        compiled.run(command, cwd=ROOT)

    text = (compiled.keep_in_cache(f"{source.stem}-ptx", key, build) / "kernels.ptx").read_text()
    parts = re.split(r"^(?=(?:\.visible |\.weak )?\.entry )", text, flags=re.MULTILINE)
    bodies, around = {}, [parts[0]]
    for part in parts[1:]:
        end = re.search(r"^\}$", part, re.MULTILINE).end()
        bodies[re.search(r"\.entry (\w+)", part).group(1)] = part[:end]
        around.append(part[end:])
    return {symbol: "".join(around) + "\n" + body + "\n" for symbol, body in bodies.items()}


def parameter_offsets(sources: list[Path]) -> dict[tuple[str, int], int]:
    """(symbol, ordinal) -> where that parameter lies among the recorded argument bytes."""
    return {
        (symbol, ordinal): offset
        for source in sources
        for symbol, where in launches.parameters(source, 90)
        for ordinal, offset, _ in [map(int, where.split())]
    }


def reads(ptx: str, sizes: dict[str, int]) -> Iterator[tuple[str, int, str, int]]:
    """(parameter, offset, kind, bytes) of everything the entry reads of its parameters. sizes: of the parameters; where
    the address is computed at run time, every place of that parameter counts as read."""
    bases = {}  # register -> (parameter, offset); offset None: computed
    for register, base, offset in re.findall(r"(?:mov|add)\.[bsu]64\s+(%\w+), ([\w%]+)(?:, ([\w%]+))?;", ptx):
        if "_param_" in base or base in bases:
            parameter, first = bases.get(base, (base, 0))
            known = first is not None and (offset or "0").isdecimal()
            bases[register] = parameter, first + int(offset or 0) if known else None
    for count, kind, bits, base, offset in sorted(set(LOAD.findall(ptx))):
        parameter, first = bases.get(base, (base, 0))
        size = int(bits) // 8
        if first is None:
            yield from ((parameter, place, kind, size) for place in range(0, sizes[parameter] - size + 1, size))
            continue
        for index in range(int(count or 1)):
            yield parameter, first + int(offset or 0) + index * size, kind, size


def parameter_sizes(ptx: str) -> dict[str, int]:
    """parameter -> its bytes."""
    found = re.findall(r"\.param (?:\.align \d+ )?\.[bfsu](\d+) (\w+_param_\d+)(?:\[(\d+)\])?", ptx)
    return {name: int(bits) // 8 * int(count or 1) for bits, name, count in found}


def verifier_input(launch: launches.Launch, ptx: str, offsets: dict[tuple[str, int], int]) -> dict:
    """The verifier's description of a launch: numbers as values, each tensor as an object of its own."""
    arguments, declarations = [], []
    taken: set[tuple[str, int]] = set()
    for parameter, offset, kind, size in sorted(set(reads(ptx, parameter_sizes(ptx))), key=lambda one: (-one[3], one)):
        if taken & {(parameter, offset + byte) for byte in range(size)}:
            continue  # read as parts of a larger number, too
        taken |= {(parameter, offset + byte) for byte in range(size)}
        ordinal = int(parameter.rsplit("_", 1)[1])
        first = offsets[launch.symbol, ordinal] + offset
        data = launch.arguments[first : first + size]
        where = {"parameter": parameter, "offset": offset}
        value = int.from_bytes(data, "little")
        tensor = next((a for a, length in launch.tensors.items() if a <= value < a + max(length, 1)), None)
        if size == 8 and tensor is not None:
            # Parts of one tensor are objects of their own here: the verifier knows no offsets. That they do not overlap
            # is left to the emulator.
            declarations.append({**where, "type": "pointer", "space": "global", "object": f"memory_{value:x}"})
        elif kind == "f":
            (number,) = struct.unpack("<f" if size == 4 else "<d", data)
            number = max(-FINITE, min(FINITE, number))  # JSON has no infinity
            arguments.append({**where, "type": f"f{8 * size}", "value": number})
        else:
            arguments.append({**where, "type": f"u{8 * size}", "value": value})
    shape = {"grid_dim": launch.grid, "block_dim": launch.block, "cluster_dim": (1, 1, 1)}
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {**shape, "dynamic_shared_bytes": launch.shared},
        "arguments": arguments,
        "declarations": declarations,
    }


def verdict_with_choices(ptx: str, given: dict, timeout: int) -> tuple[str, str, float]:
    """As `verdict`; where the kernel branches on data, one side of each such branch is chosen and written into `given`:
    for an if the verifier's own choice, for what it does not recognise as one (the end of a search) the next line."""
    seconds = 0.0
    lines = ptx.splitlines()
    while True:
        result, why, more, line = verdict(ptx, given, timeout)
        seconds += more
        if result != "unsupported":
            return result, why, seconds
        if "assumptions" not in given:
            given["assumptions"] = {"representative_branches": True}
        elif line and "bra" in lines[line - 1] and len(given.setdefault("branch_decisions", [])) < 20:
            given["branch_decisions"].append({"line": line, "taken": False})
        else:
            return result, f"{why} (PTX line {line})", seconds


def verdict(ptx: str, description: dict, timeout: int) -> tuple[str, str, float, int | None]:
    """(result, first sentence of why, seconds, line of the PTX that it is about)."""
    with tempfile.TemporaryDirectory() as folder:
        kernel, given = Path(folder, "kernel.ptx"), Path(folder, "input.json")
        kernel.write_text(ptx)
        given.write_text(json.dumps(description))
        begin = time.monotonic()
        command = ["sentryward", str(kernel), "--input", str(given), "--timeout", str(timeout)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout + 30)
        except subprocess.TimeoutExpired:
            return "timeout", "", time.monotonic() - begin, None
        seconds = time.monotonic() - begin
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        return "error", (done.stderr or done.stdout).strip()[-300:], seconds, None
    found = answer.get("diagnostics") or [{}]
    line = found[0].get("details", {}).get("location", {}).get("line")
    return answer.get("result", "error"), found[0].get("message") or reason(answer), seconds, line


def reason(answer: dict) -> str:
    """The first message found in an answer, for people."""
    waiting = [answer]
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, dict):
            for key in ("message", "reason", "detail", "description"):
                if isinstance(part.get(key), str):
                    return part[key].splitlines()[0][:160]
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return ""


def mutants(ptx: str) -> Iterator[tuple[str, str]]:
    """(what was removed, PTX without it), one barrier or wait at a time."""
    for match in ORDERS_MEMORY.finditer(ptx):
        line = ptx[: match.start()].count("\n") + 1
        yield f"{match.group().strip()} (line {line})", ptx[: match.start()] + ptx[match.end() :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pattern that the kernel's name must contain")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one verdict")
    parser.add_argument("--mutants", action="store_true")
    parser.add_argument("--case", default="small", help="a function of tests/sass/cases.py")
    parser.add_argument("--keep", type=Path, help="folder for the PTX and JSON handed to the verifier")
    chosen = parser.parse_args()
    sources = compiled.listed_sources("cuda_sources")
    offsets = parameter_offsets(sources)
    ptx = {symbol: text for source in sources for symbol, text in entries(source).items()}
    names = compiled.short_names(ptx)
    seen, bad = set(), 0
    for launch in launches.record(chosen.case, (ARCHITECTURE,))[ARCHITECTURE]:
        name = names[launch.symbol]
        if launch.symbol in seen or not re.search(chosen.only, name):
            continue
        seen.add(launch.symbol)
        given = verifier_input(launch, ptx[launch.symbol], offsets)
        if chosen.keep:
            chosen.keep.mkdir(parents=True, exist_ok=True)
            (chosen.keep / f"{len(seen)}.ptx").write_text(ptx[launch.symbol])
            (chosen.keep / f"{len(seen)}.json").write_text(json.dumps(given, indent=1))
        result, why, seconds = verdict_with_choices(ptx[launch.symbol], given, chosen.timeout)
        if "assumptions" in given:
            name += ", one side of each branch on data"
        shape = f"grid {'x'.join(map(str, launch.grid))}, {launch.threads} threads, {launch.shared} B"
        why = "" if result == "race_free" else why
        print(f"{result:15s} {seconds:6.1f} s  {name}  [{shape}; {launch.case}]  {why}", flush=True)
        bad += result == "potential_race"
        if chosen.mutants and result == "race_free":
            bad += not rejects_a_mutant(ptx[launch.symbol], given, chosen.timeout)
    raise SystemExit(f"{bad} kernels may race, or no mutant of theirs was rejected" if bad else 0)


def rejects_a_mutant(ptx: str, given: dict, timeout: int) -> bool:
    """Whether the verifier says no to one of the mutants; true for a kernel that orders nothing."""
    tried = 0
    for removed, mutant in mutants(ptx):
        tried += 1
        result, _, seconds, _ = verdict(mutant, given, timeout)
        print(f"    {result:15s} {seconds:6.1f} s  without {removed}", flush=True)
        if result not in ("race_free", "unsupported", "timeout", "error"):
            return True
    return tried == 0


if __name__ == "__main__":
    if problem := compiled.missing_tool():
        raise SystemExit(f"static_races: {problem}")
    main()
