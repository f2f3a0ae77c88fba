"""A group of chunks of a fast weight for TPUs (Pallas, Mosaic): a head's weights stay in vector memory while its chunks pass.

The grid goes over rows, heads and, in order, chunks. What is done with one is `chunks.chunk`, traced in the kernel; its
backward pass is the derivative of that function, taken there too. The backward kernel passes over a group twice: forward, to
keep the weights before each chunk in vector memory, and back. Nothing but what the group was given is kept for it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.fast_weight.chunks import chunk
from pallas_kernels.fast_weight.coefficients import row, unpacked
from pallas_kernels.fast_weight.network import Network
from pallas_kernels.fast_weight.traced import Work, work
from pallas_kernels.fast_weight.triangular import solved
from pallas_kernels.tpu_chips import MIB, SUBLANES, kernel_room, padded_bytes, this_chip

BEGINS, WHOLE, LIVE = range(3)  # flags of a chunk
OWN = MIB  # for the compiler
MARGIN = 1.6  # of what a program in another order holds


class Rule(NamedTuple):
    """What is done with every chunk: see `op.FastWeight`. Static."""

    network: Network
    overshoot: float | None
    norm: float | None
    interpret: Any = False


class Given(NamedTuple):
    """Arrays of float32. state: weights and momentum, leaves [B,H,...]. first: the same of [H,...], or None where no chunk
    begins with it. fixed: [H,...]. pieces: q, k, v and `Packed` coefficients, [n,B,H,b,...]."""

    state: tuple
    first: tuple | None
    fixed: Any
    pieces: tuple


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def group(rule: Rule, given: Given, flags: Int[Array, "3 n B"]):
    """(out [n,B,H,b,E], loss [n,B,H,b], state behind) of n chunks. flags: begins, whole, live as `op.Course` has them."""
    return _forward(rule, given, flags)[0]


def of_head(rule: Rule, state: tuple, fixed: Any, pieces: tuple) -> tuple:
    """(out [b,E], loss [1,b], state behind) of one head's chunk."""
    q, k, v, coefficients = pieces
    options = {"overshoot": rule.overshoot, "solve": solved}
    out, *state, loss, _ = chunk(rule.network, *state, unpacked(coefficients), q, k, v, fixed, **options)
    return out, row(loss), tuple(jax.tree.map(lambda x: _bounded(x, rule.norm), state))


def _bounded(x: Array, most: float | None) -> Array:
    if most is None:
        return x
    square = jnp.sum(x**2, keepdims=True)
    over = square > most**2
    return x * jnp.where(over, most * jax.lax.rsqrt(jnp.where(over, square, 1.0)), 1.0)


class Leaves:
    """The leaves of a tree, `lead` axes of which are places of programs: a block is one place, of two axes at least."""

    def __init__(self, tree: Any, lead: int):
        self.arrays, self.structure = jax.tree.flatten(tree)
        self.lead = lead

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        row = lambda shape: (*shape[: self.lead], *(1,) * (self.lead + 2 - len(shape)), *shape[self.lead :])
        return [row(x.shape) for x in self.arrays]

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        return [shape[self.lead :] for shape in self.shapes]

    @property
    def places(self) -> int:
        return math.prod(self.arrays[0].shape[: self.lead]) if self.arrays else 0

    def specs(self, place: Callable) -> list[pl.BlockSpec]:
        """place: of a program's row, head and step."""
        whole = lambda block: lambda i, h, s, _: (*place(i, h, s), *(0,) * len(block))
        return [pl.BlockSpec(((None,) * self.lead) + block, whole(block)) for block in self.blocks]

    def read(self, refs: Sequence[Any], *at: Any) -> Any:
        flat = [x.ndim - self.lead < 2 for x in self.arrays]
        return jax.tree.unflatten(
            self.structure, [ref[(*at, 0)] if f else ref[at or ...] for ref, f in zip(refs, flat, strict=True)]
        )

    def write(self, refs: Sequence[Any], tree: Any, *at: Any) -> None:
        for ref, x, block in zip(refs, jax.tree.leaves(tree), self.blocks, strict=True):
            ref[at or ...] = x.reshape(block)

    def restored(self, found: Sequence[Array]) -> Any:
        return jax.tree.unflatten(self.structure, [y.reshape(x.shape) for y, x in zip(found, self.arrays, strict=True)])


def _like(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _rows_of(tree: Any, rows: int) -> Any:
    """Of every row what `tree` has of leaves [H,...]."""
    return jax.tree.map(lambda x: _like(rows, *x.shape), tree)


def _parts(given: Given) -> tuple[Leaves, Leaves, Leaves, Leaves, Leaves]:
    """Those of `Given`, and of what is found in each chunk."""
    n, B, H, b = given.pieces[0].shape[:4]
    found = _like(n, B, H, b, given.pieces[2].shape[-1]), _like(n, B, H, 1, b)
    return *(Leaves(tree, lead) for tree, lead in zip(given, (2, 1, 1, 3), strict=True)), Leaves(found, 3)


def _row(i, h, s):
    return i, h


def _head(i, h, s):
    return (h,)


def _forward(rule: Rule, given: Given, flags: Array):
    n, B, H = given.pieces[0].shape[:3]
    state, first, fixed, pieces, found = _parts(given)
    at_chunk = lambda i, h, s: (s, i, h)

    def body(c, flag, inputs, outputs, _):
        (at_state, at_first, at_fixed, at_pieces), (at_found, held) = inputs, outputs

        @pl.when(c == 0)
        def _():
            state.write(held, state.read(at_state))

        if given.first is not None:

            @pl.when(flag(BEGINS, c))
            def _():
                state.write(held, first.read(at_first))

        @pl.when(flag(LIVE, c))
        def _():
            out, loss, after = of_head(rule, state.read(held), fixed.read(at_fixed), pieces.read(at_pieces))
            found.write(at_found, (out, loss))

            @pl.when(flag(WHOLE, c))
            def _():
                state.write(held, after)

        @pl.when(jnp.logical_not(flag(LIVE, c)))
        def _():
            _clear(at_found)

    inputs = (state, _row), (first, _head), (fixed, _head), (pieces, at_chunk)
    outputs = (found, at_chunk), (state, _row)
    (out, loss), after = _launch(
        rule, body, (B, H, n), flags, inputs, outputs, (), _work_forward(rule, given), n, footprint(rule, given, n)
    )
    return (out, loss[..., 0, :], after), (given, flags)


def _backward(rule: Rule, kept: tuple[Given, Array], cotangents: tuple):
    given, flags = kept
    d_out, d_loss, d_after = cotangents
    d_found = d_out, d_loss[..., None, :]
    n, B, H = given.pieces[0].shape[:3]
    state, first, fixed, pieces, found = _parts(given)
    d_first, d_fixed = (Leaves(_rows_of(tree, B), 2) for tree in (given.first, given.fixed))
    turned = lambda s: jnp.minimum(s, 2 * (n - 1) - s)
    at_chunk = lambda i, h, s: (turned(s), i, h)
    way_back = lambda i, h, s: (jnp.minimum(n - 1, 2 * (n - 1) - s), i, h)

    def body(s, flag, inputs, outputs, starts):
        at_state, at_first, at_fixed, at_pieces, at_found, at_after = inputs
        to_pieces, to_state, to_first, to_fixed = outputs
        c = turned(s)

        @pl.when(s == 0)
        def _():
            state.write(starts, state.read(at_state), 0)

        if given.first is not None:

            @pl.when(flag(BEGINS, c) & (s < n))
            def _():
                state.write(starts, first.read(at_first), c)

        @pl.when(s < n - 1)
        def _():
            start = state.read(starts, c)
            state.write(starts, start, c + 1)

            @pl.when(flag(WHOLE, c))
            def _():
                after = of_head(rule, start, fixed.read(at_fixed), pieces.read(at_pieces))[2]
                state.write(starts, after, c + 1)

        @pl.when(s == n - 1)
        def _():
            state.write(to_state, state.read(at_after))
            _clear(to_first)
            _clear(to_fixed)

        @pl.when((s >= n - 1) & flag(LIVE, c))
        def _():
            arrays = state.read(starts, c), fixed.read(at_fixed), pieces.read(at_pieces)
            _, pull = jax.vjp(functools.partial(of_head, rule), *arrays)
            behind, whole = state.read(to_state), flag(WHOLE, c)
            through = jax.tree.map(lambda x: jnp.where(whole, x, 0.0), behind)
            d_start, d_own, d_pieces = pull((*found.read(at_found), through))
            pieces.write(to_pieces, d_pieces)
            past = jax.tree.map(lambda x: jnp.where(whole, 0.0, x), behind)
            state.write(to_state, jax.tree.map(jnp.add, d_start, past))
            d_fixed.write(to_fixed, jax.tree.map(jnp.add, d_fixed.read(to_fixed), d_own))

        @pl.when((s >= n - 1) & jnp.logical_not(flag(LIVE, c)))
        def _():
            _clear(to_pieces)

        if given.first is not None:

            @pl.when((s >= n - 1) & flag(BEGINS, c))
            def _():
                d_first.write(to_first, jax.tree.map(jnp.add, d_first.read(to_first), state.read(to_state)))
                _clear(to_state)

    inputs = (state, _row), (first, _head), (fixed, _head), (pieces, at_chunk)
    inputs = *inputs, (Leaves(d_found, 3), way_back), (Leaves(d_after, 2), _row)
    outputs = (pieces, way_back), (state, _row), (d_first, _row), (d_fixed, _row)
    scratch = [(n, *block) for block in state.blocks]
    d_pieces, d_state, d_first, d_fixed = _launch(
        rule,
        body,
        (B, H, 2 * n - 1),
        flags,
        inputs,
        outputs,
        scratch,
        _work_backward(rule, given),
        n,
        footprint(rule, given, n),
    )
    over_rows = lambda tree: jax.tree.map(lambda x: x.sum(axis=0), tree)
    return Given(d_state, over_rows(d_first), over_rows(d_fixed), d_pieces), np.zeros(flags.shape, jax.dtypes.float0)


group.defvjp(_forward, _backward)


def refused(rule: Rule, given: Given, chunks: int) -> str | None:
    """Why groups of so many chunks are not for the kernels, if they are not."""
    b = given.pieces[0].shape[3]
    if b % SUBLANES:
        return f"chunks of {b} tokens: the kernel takes multiples of {SUBLANES}"
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves(given)):
        return "arrays wider than float32"
    held, room = footprint(rule, given, chunks), kernel_room(this_chip())
    return None if held <= room else f"{held / MIB:.1f} MiB of vector memory: expected at most {room / MIB:.1f}"


def footprint(rule: Rule, given: Given, chunks: int) -> int:
    """Bytes of vector memory that the backward kernel takes, the forward one less: blocks twice, one being computed with while
    the next is copied; weights before every chunk; and what a chunk's derivative holds at a time."""
    state, first, fixed, pieces, found = (sum(map(padded_bytes, part.blocks)) for part in _parts(given))
    blocks = 3 * state + 2 * (first + fixed + pieces) + found
    return 2 * blocks + chunks * state + int(MARGIN * _work_backward(rule, given).peak) + OWN


def _clear(refs: Sequence[Any]) -> None:
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def _of_one(given: Given) -> tuple:
    """Shapes of what `of_head` gets."""
    cut = lambda tree, lead: jax.tree.map(lambda x: _like(*x.shape[lead:]), tree)
    return cut(given.state, 2), cut(given.fixed, 1), cut(given.pieces, 3)


def _work_forward(rule: Rule, given: Given) -> Work:
    return work(functools.partial(of_head, rule), *_of_one(given))


def _work_backward(rule: Rule, given: Given) -> Work:
    """Of the forward pass again and of the derivative's."""
    run = functools.partial(of_head, rule)
    shapes = _of_one(given)
    there = work(run, *shapes)
    back = work(lambda given, by: jax.vjp(run, *given)[1](by), shapes, jax.eval_shape(run, *shapes))
    return Work(there.flops + back.flops, there.elements + back.elements, max(there.peak, back.peak))


def _launch(
    rule: Rule,
    body: Callable,
    grid: tuple[int, int, int],
    flags: Array,
    inputs: Sequence[tuple[Leaves, Callable]],
    outputs: Sequence[tuple[Leaves, Callable]],
    scratch: Sequence[tuple[int, ...]],
    each: Work,
    chunks: int,
    held: int,
) -> list:
    """What `body` leaves in the outputs. It gets its step, flags as a function of kind and chunk, and the refs of each
    part. each: of a
    chunk. held: bytes of vector memory."""
    counts = [len(part.arrays) for part, _ in (*inputs, *outputs)]
    rows = grid[0]

    def kernel(codes, *refs):
        row, step = pl.program_id(0), pl.program_id(2)
        flag = lambda kind, c: codes[(kind * chunks + c) * rows + row] != 0
        starts = np.cumsum([0, *counts])
        parts = [refs[start : start + count] for start, count in zip(starts, counts, strict=False)]
        body(step, flag, parts[: len(inputs)], parts[len(inputs) :], refs[starts[-1] :])

    specs = lambda parts: [spec for part, place in parts for spec in part.specs(place)]
    shapes = lambda parts: [shape for part, _ in parts for shape in part.shapes]
    times = chunks * rows * grid[1]
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=specs(inputs),
            out_specs=specs(outputs),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[_like(*shape) for shape in shapes(outputs)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=held),
        cost_estimate=pl.CostEstimate(
            flops=times * each.flops,
            transcendentals=0,
            bytes_accessed=4 * sum(map(math.prod, (*shapes(inputs), *shapes(outputs)))),
        ),
        interpret=rule.interpret,
    )
    arrays = [x.reshape(shape) for part, _ in inputs for x, shape in zip(part.arrays, part.shapes, strict=True)]
    found = call(flags.reshape(-1).astype(jnp.int32), *arrays)
    starts = np.cumsum([0, *(len(part.arrays) for part, _ in outputs)])
    return [part.restored(found[a : a + len(part.arrays)]) for a, (part, _) in zip(starts, outputs, strict=False)]
