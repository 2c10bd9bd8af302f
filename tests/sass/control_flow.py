"""Reads a disassembly: instructions, and which of them lie in a loop.

A loop here is a natural loop: an edge back to a block that dominates the edge's source, and every block that reaches
that source without passing the target. (Address order would not do: the compiler places rare code behind the end and
jumps back from there.)
"""

import re
from dataclasses import dataclass

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.ASCII)
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
NO_JUMP = ("BSSY", "LEPC", "MOV", "BMOV", "UMOV")  # name a label without going there


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Args:
        address: in bytes from the kernel's start.
        predicate: `P0`, `!P1`, ..., or empty.
        opcode: with its modifiers, e.g. `LDG.E.128.CONSTANT`.
        operands: the rest of the line.
        in_loop: whether it lies in a loop.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    in_loop: bool = False


def read_instructions(sass: str) -> dict[str, tuple[Instruction, ...]]:
    """symbol -> instructions, from `nvdisasm -c`."""
    found = {}
    for part in re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:]:
        symbol, _, body = part.partition(":")
        instructions, labels = [], {}
        for line in body.splitlines():
            if match := LABEL.match(line):
                labels[match.group(1)] = len(instructions)
            elif match := LINE.match(line):
                address, predicate, opcode, operands = match.groups()
                instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands))
        assert instructions, f"no instruction found in {symbol}"
        looping = _in_loops(instructions, labels)
        found[symbol] = tuple(
            Instruction(i.address, i.predicate, i.opcode, i.operands, index in looping)
            for index, i in enumerate(instructions)
        )
    return found


def _in_loops(instructions: list[Instruction], labels: dict[str, int]) -> set[int]:
    """Indices of the instructions that lie in a natural loop."""
    starts, follows = _blocks(instructions, labels)
    before = {block: set() for block in starts}
    for block, targets in follows.items():
        for target in targets:
            before[target].add(block)
    order = _reverse_postorder(starts[0], follows)
    dominators = _dominators(order, before)
    looping = set()
    for block in order:
        for head in follows[block]:
            if head in dominators[block]:
                looping |= _loop_body(head, block, before)
    ends = dict(zip(starts, [*starts[1:], len(instructions)]))
    return {index for block in looping for index in range(block, ends[block])}


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> tuple[list[int], dict[int, set[int]]]:
    """(first indices of the basic blocks, block -> blocks that may follow)."""
    meets: dict[str, set[int]] = {}  # convergence barrier -> where its threads go on
    for i in instructions:
        if i.opcode.startswith("BSSY"):
            meets.setdefault(i.operands.split(",")[0], set()).update(labels[t] for t in TARGET.findall(i.operands))
    jumps: dict[int, set[int]] = {}
    for index, i in enumerate(instructions):
        targets = set() if i.opcode.startswith(NO_JUMP) else {labels[t] for t in TARGET.findall(i.operands)}
        if i.opcode.startswith("BSYNC"):
            targets = meets.get(i.operands.split(",")[0], set())
        ends = i.opcode.startswith(("EXIT", "RET", "BRX", "JMX", "BRA"))
        if targets or ends:
            always = not i.predicate and (ends or i.opcode.startswith("BSYNC")) and "DIV" not in i.opcode
            # `BRA P0, label` and `BRA.U UP0, label` carry their condition among the operands.
            always = always and not re.match(r"!?U?P\d", i.operands)
            jumps[index] = targets | (set() if always else {index + 1})
    count = len(instructions)
    starts = {0, *labels.values(), *(index + 1 for index in jumps), *(t for targets in jumps.values() for t in targets)}
    ordered = sorted(start for start in starts if start < count)
    follows = {}
    for start, end in zip(ordered, [*ordered[1:], count]):
        follows[start] = {t for t in jumps.get(end - 1, {end}) if t < count}
    return ordered, follows


def _reverse_postorder(entry: int, follows: dict[int, set[int]]) -> list[int]:
    order, seen, stack = [], {entry}, [(entry, iter(sorted(follows[entry])))]
    while stack:
        block, targets = stack[-1]
        for target in targets:
            if target not in seen:
                seen.add(target)
                stack.append((target, iter(sorted(follows[target]))))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def _dominators(order: list[int], before: dict[int, set[int]]) -> dict[int, set[int]]:
    """block -> blocks on every way to it, itself included."""
    everything, found = set(order), {}
    found = dict.fromkeys(order, everything)
    found[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            ways = [found[b] for b in before[block] if b in found]
            now = set.intersection(*ways) | {block}
            if now != found[block]:
                found[block], changed = now, True
    return found


def _loop_body(head: int, tail: int, before: dict[int, set[int]]) -> set[int]:
    body, waiting = {head}, [tail]
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting += before[block]
    return body
