"""What takes the memory of a compiled program, by name: read off the buffer assignment that the compiler writes on request."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from lcx.parallel.hlo import parse

_ALLOCATION = re.compile(r"^allocation \d+: size \d+,(.*)$")
_VALUE = re.compile(r"^ value: <\d+ (\S+) @\d+> \(size=(\d+),offset=\d+\): (\S+)")


class Temporary(NamedTuple):
    """A value that the program makes on the way. name: the JAX operations that it comes from, or the compiler's name for it."""

    bytes: int
    shape: str
    name: str


def compiled_with_temporaries(
    compile: Callable[[dict[str, str | bool]], jax.stages.Compiled], count: int
) -> tuple[jax.stages.Compiled, list[Temporary]]:
    """The program of `compile(compiler options)`, and its `count` largest temporaries; none where the compiler tells none."""
    with tempfile.TemporaryDirectory() as folder:
        program = compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = [path.read_text() for path in Path(folder).glob("*-buffer-assignment.txt")]
    return program, largest(max(written, key=len, default=""), program.as_text(), count)


def largest(assignment: str, program: str, count: int) -> list[Temporary]:
    """The `count` largest temporaries in the device's main memory, alike ones once. They need not exist at the same time.

    assignment, program: texts of the buffer assignment and of the scheduled HLO.
    """
    instructions = {one.name: one for body in parse(program).computations.values() for one in body}
    found, kept = set(), False
    for line in assignment.splitlines():
        if heading := _ALLOCATION.match(line):
            kept = "preallocated-temp" in heading[1] and "color" not in heading[1]
        elif kept and (value := _VALUE.match(line)):
            name = value[1].partition("{")[0]
            made_by = instructions[name].op_name if name in instructions else ""
            found.add(Temporary(int(value[2]), value[3].partition("{")[0], made_by or name))
    return sorted(found, key=lambda one: (-one.bytes, one.shape, one.name))[:count]
