"""What a compiled program sends, and behind what: read off the text of its scheduled HLO, `compiled.as_text()`.

`collectives` counts the bytes that a device sends in one run. With n devices in a group and x bytes of operands on a device:
    all-gather x (n - 1), all-reduce 2 x (n - 1) / n, reduce-scatter and all-to-all x (n - 1) / n, collective-permute x
which is what rings and pairwise exchanges send; it is a measure of traffic, not of time. `overlaps` says which kernels run
while a permute is under way: the order of a computation's instructions is the order in which they are issued.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # the others say it: s4, f32, f8e4m3fn

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z0-9]*)?)\[([0-9,]*)\]")


class Collective(NamedTuple):
    """Sends of one kind: how many a device takes part in, bytes it sends, and whether some were counted by an assumption."""

    count: int
    bytes: int
    assumed: bool = False


class Overlap(NamedTuple):
    """A permute of a computation with kernels, and those issued between its start and its end; none if it blocks."""

    computation: str
    permute: str
    bytes: int
    kernels: tuple[str, ...]


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # from the operands on
    root: bool

    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of computations by role."""
        return {role: tuple(re.findall(r"[\w.\-]+", names)) for role, names in _CALLED.findall(self.rest)}

    @property
    def op_name(self) -> str:
        """The JAX scopes and primitive that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Program(NamedTuple):
    """Computations by name, their instructions in the order of the schedule."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    devices: int


def collectives(text: str, trips: Callable[[str], int] | None = None) -> dict[str, Collective]:
    """Sends of one run by kind, loop bodies as often as they run, of a conditional the branch that sends most.

    trips: how often a loop runs, or that branch, where both send and the text does not tell, from the op_name; without it, 1.
    """
    program = parse(text)
    return {kind: found for kind, found in _sent(program, program.entry, trips or (lambda _: 1)).items() if found.count}


def overlaps(text: str, kernel: str = "tpu_custom_call") -> list[Overlap]:
    """Every permute of the computations that run a kernel, a custom call to `kernel`, themselves or in what they call."""
    program = parse(text)
    runs = {}  # whether a computation runs a kernel

    def running(name):
        if name not in runs:
            runs[name] = False
            runs[name] = any(is_kernel(instruction) for instruction in program.computations.get(name, ()))
        return runs[name]

    def is_kernel(instruction):
        if instruction.opcode == "custom-call":
            return f'custom_call_target="{kernel}"' in instruction.rest
        return any(running(name) for names in instruction.called().values() for name in names)

    found = []
    for name, instructions in program.computations.items():
        kernels = [place for place, instruction in enumerate(instructions) if is_kernel(instruction)]
        for start, end in _permutes(instructions) if kernels else ():
            between = tuple(instructions[place].name for place in kernels if start < place < end)
            sent = operand_bytes(instructions[start], instructions)
            found.append(Overlap(name, instructions[start].name, sent, between))
    return found


def parse(text: str) -> Program:
    """Raises ValueError if it is not the text of a scheduled module."""
    header = text.partition("\n")[0]
    if "is_scheduled=true" not in header:
        raise ValueError(f"not a scheduled HLO module: {header[:80]!r}")
    entry, name, computations = "", "", {}
    for line in text.splitlines():
        if started := _COMPUTATION.match(line):
            name = started[2]
            entry = name if started[1] else entry
            computations[name] = []
        elif name and (found := _INSTRUCTION.match(line)):
            root, own, shape, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", _inside(rest)))
            computations[name].append(Instruction(own, shape, opcode, operands, rest, bool(root)))
    size = lambda field: int(found[1]) if (found := re.search(rf"{field}=(\d+)", header)) else 1
    devices = size("num_partitions") * size("replica_count")
    return Program(entry, {name: tuple(found) for name, found in computations.items()}, devices)


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple, without padding."""
    bits = 0
    for dtype, dims in _ARRAY.findall(shape):
        size = math.prod(int(dim) for dim in dims.split(",") if dim)
        width = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        bits += size * width
    return -(-bits // 8)


def trip_count(program: Program, loop: Instruction, around: tuple[Instruction, ...]) -> int | None:
    """Trips of a while loop: the compiler's note, else counted from constant bounds and step; None if unknown."""
    if found := re.search(r'known_trip_count":?=?\{"?n"?:"?(\d+)', loop.rest):
        return int(found[1])
    condition = program.computations[loop.called()["condition"][0]]
    by_name = {instruction.name: instruction for instruction in condition}
    test = next(instruction for instruction in condition if instruction.root)
    initial = _named(loop.operands[0], around)
    if test.opcode != "compare" or "direction=LT" not in test.rest or initial is None or initial.opcode != "tuple":
        return None
    counter, bound = (by_name.get(operand) for operand in test.operands)
    step = _step(program, loop, _index(counter)) if counter is not None and counter.opcode == "get-tuple-element" else None
    if step is None:
        return None
    start = _constant(initial.operands[_index(counter)], around)
    inside = bound is not None and bound.opcode == "get-tuple-element"
    stop = _constant(initial.operands[_index(bound)], around) if inside else _constant(test.operands[1], condition)
    return None if start is None or stop is None else max(0, -((start - stop) // step))


def _sent(program: Program, name: str, trips: Callable[[str], int]) -> dict[str, Collective]:
    instructions = program.computations.get(name, ())
    total = dict.fromkeys(KINDS, Collective(0, 0))

    def add(found, times=1, assumed=False):
        for kind, (count, size, before) in found.items():
            now = total[kind]
            assume = now.assumed or (count > 0 and (before or assumed))
            total[kind] = Collective(now.count + times * count, now.bytes + times * size, assume)

    for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        called = instruction.called()
        if kind in KINDS and not _continues(instruction, instructions):
            add(_own(program, name, instruction))
        elif instruction.opcode == "while":
            sent = _sent(program, called["body"][0], trips)
            if any(found.count for found in sent.values()):
                known = trip_count(program, instruction, instructions)
                add(sent, trips(instruction.op_name) if known is None else known, known is None)
        elif instruction.opcode == "conditional":
            branches = [_sent(program, branch, trips) for names in called.values() for branch in names]
            most = max(branches, key=lambda sent: sum(found.bytes for found in sent.values()))
            differ = any(branch != most for branch in branches)
            add(most, trips(instruction.op_name) if differ else 1, differ)
        elif instruction.opcode not in ("async-update", "async-done"):
            for callee in called.get("calls", ()) + (called.get("to_apply", ()) if instruction.opcode == "call" else ()):
                add(_sent(program, callee, trips))
    return total


def _own(program: Program, name: str, instruction: Instruction) -> dict[str, Collective]:
    kind, n = instruction.opcode.removesuffix("-start"), group_size(instruction, program.devices)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a fusion of the TPU compiler that keeps a slice
        kind = "reduce-scatter"
    size = operand_bytes(instruction, program.computations[name])
    parts = {"all-gather": n * (n - 1), "all-reduce": 2 * (n - 1), "collective-permute": n}.get(kind, n - 1)
    return {kind: Collective(1, size * parts // n)}


def _continues(instruction: Instruction, around: tuple[Instruction, ...]) -> bool:
    """Whether it is a later part of a collective that the TPU compiler has cut up and fused with matrix products."""
    starts = any('custom_call_target="AsyncCollectiveStart"' in other.rest for other in around)
    return "chain_id=" in instruction.rest and not starts


def group_size(instruction: Instruction, devices: int) -> int:
    """Devices that exchange with each other in a collective."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", instruction.rest):
        sizes = dict(re.findall(r"('[^']*')=(\d+)", found[1]))
        axes = re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.rest)
    return len(found[1].split(",")) if found else devices


def operand_bytes(instruction: Instruction, around: tuple[Instruction, ...]) -> int:
    """Bytes of what it takes, which stands around it."""
    named = (_named(operand, around) for operand in instruction.operands)
    return sum(shape_bytes(operand.shape) for operand in named if operand is not None)


def _permutes(instructions: tuple[Instruction, ...]) -> Iterator[tuple[int, int]]:
    """Places of start and end; the same place if the permute is blocking."""
    ends = {i.operands[0]: place for place, i in enumerate(instructions) if i.opcode == "collective-permute-done"}
    for place, instruction in enumerate(instructions):
        if instruction.opcode in ("collective-permute", "collective-permute-start"):
            yield place, ends.get(instruction.name, place)


def _named(name: str, instructions: tuple[Instruction, ...]) -> Instruction | None:
    return next((instruction for instruction in instructions if instruction.name == name), None)


def _original(name: str, instructions: tuple[Instruction, ...]) -> Instruction | None:
    """What a name stands for, through copies."""
    found = _named(name, instructions)
    while found is not None and found.opcode in ("copy", "copy-done", "copy-start", "bitcast"):
        found = _named(found.operands[0], instructions)
    return found


def _constant(name: str, instructions: tuple[Instruction, ...]) -> int | None:
    """The integer that a name stands for."""
    found = _original(name, instructions)
    value = re.match(r"(-?\d+)\)", found.rest) if found is not None and found.opcode == "constant" else None
    return int(value[1]) if value else None


def _step(program: Program, loop: Instruction, index: int) -> int | None:
    """What the loop's body adds to this element of its state: a positive constant; None if it does something else."""
    body = program.computations[loop.called()["body"][0]]
    result = next(instruction for instruction in body if instruction.root)
    new = _original(result.operands[index], body) if result.opcode == "tuple" else None
    if new is None or new.opcode != "add":
        return None
    old, step = (_original(operand, body) for operand in new.operands)
    same = old is not None and old.opcode == "get-tuple-element" and _index(old) == index
    size = _constant(step.name, body) if same and step is not None else None
    return size if size is not None and size > 0 else None


def _index(element: Instruction) -> int:
    return int(re.search(r"index=(\d+)", element.rest)[1])


def _inside(rest: str) -> str:
    """Up to the parenthesis that closes the operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place]
    return rest
