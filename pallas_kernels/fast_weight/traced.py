"""What a function does, from its trace: FLOPs of its products, and bytes of the values that it holds at a time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pallas_kernels.tpu_chips import padded_bytes


class Work(NamedTuple):
    """flops: of products of matrices. elements: of all other results. peak: bytes of values that are read later, as vector
    memory holds them, where the program's order is kept."""

    flops: int
    elements: int
    peak: int


def work(function: Callable, *shapes: Any) -> Work:
    return _work(jax.make_jaxpr(function)(*shapes).jaxpr)


def _work(program: Any) -> Work:
    flops = elements = peak = live = 0
    last = {}
    for at, equation in enumerate(program.eqns):
        last |= {variable: at for variable in equation.invars if not hasattr(variable, "val")}
    last |= {variable: len(program.eqns) for variable in program.outvars if not hasattr(variable, "val")}
    ends = {}
    for at, equation in enumerate(program.eqns):
        made = [variable.aval for variable in equation.outvars]
        live += sum(map(_bytes, made))
        for variable in equation.outvars:
            ends.setdefault(last.get(variable, at), []).append(variable)
        inner = [_work(getattr(x, "jaxpr", x)) for x in _programs(equation.params)]
        peak = max(peak, live + max((x.peak for x in inner), default=0))
        flops += sum(x.flops for x in inner)
        elements += sum(x.elements for x in inner)
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval.shape
            flops += 2 * math.prod(made[0].shape) * math.prod(left[axis] for axis in contracted)
        elif not inner:
            elements += sum(math.prod(aval.shape) for aval in made)
        live -= sum(_bytes(variable.aval) for variable in ends.pop(at, ()))
    return Work(flops, elements, peak)


def _bytes(aval: Any) -> int:
    return padded_bytes(aval.shape, aval.dtype.itemsize)


def _programs(params: dict) -> list[Any]:
    is_program = lambda x: hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")
    return [x for x in jax.tree.leaves(list(params.values()), is_leaf=is_program) if is_program(x)]
