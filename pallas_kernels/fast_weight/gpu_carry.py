"""A linear state through a group of chunks in one GPU kernel (Pallas, Triton), and its derivative through them in another.

With X_s the state's matrices (the weights W, and their momentum S if there is one), chunk after chunk:
    e = own + sum_s reads_s X_s,   X_s' = sum_r mix_sr X_r - writes_s^T e
Gated delta rules have this form once their triangular systems are solved (Yang et al., Gated Delta Networks, 2024).
With G the gradient behind a chunk and d what reaches e and X from elsewhere, backward:
    de = d_e - sum_s writes_s G_s,   dX_s = d_X_s + sum_r mix_rs G_r + reads_s^T de
Columns of X need nothing of each other: a program has some columns of one head and row in registers, and its chunks in a loop.
What de and dX leave to do (gradients of reads, writes and mix) has no order and is XLA's.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from pallas_kernels.fast_weight.network import product
from pallas_kernels.fast_weight.tpu import BEGINS, WHOLE

SMALLEST = 16  # tokens and rows: the least that a matrix product takes
CHUNK, HEAD = 64, 256  # the most tokens of a chunk, and rows of all matrices
COLUMNS, WARPS = 16, 8  # of a program
ROWS = 64  # of a product, whose float32 operands Triton (3.9, for 8.0 and 9.0) holds in registers: with more it spills
AXES = {  # of arrays by name; k flags, m coefficients
    "flags": "knB",
    "mix": "nBHm",
    **dict.fromkeys(("state", "after", "d_after"), "BHDE"),
    "first": "HDE",
    **dict.fromkeys(("before", "d_before", "d_start"), "nBHDE"),
    **dict.fromkeys(("reads", "writes"), "nBHbD"),
    **dict.fromkeys(("own", "steps", "d_steps", "d_own"), "nBHbE"),
}


class Chunks(NamedTuple):
    """Arrays of float32, those of the state in a tuple. first: None where no chunk begins with it. reads: None where X_s is not
    read, which all may be. mix: of X_s' by X_r at s * matrices + r."""

    state: tuple[Float[Array, "B H D E"], ...]
    first: tuple[Float[Array, "H D E"], ...] | None
    own: Float[Array, "n B H b E"]
    reads: tuple[Float[Array, "n B H b D"] | None, ...]
    writes: tuple[Float[Array, "n B H b D"], ...]
    mix: Float[Array, "n B H m"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def carried(interpret: bool, given: Chunks, flags: Int[Array, "k n B"]) -> tuple[tuple, Float[Array, "n B H b E"], tuple]:
    """(X before each chunk, e of each chunk, X behind the last). flags: at `BEGINS` the chunks that begin with `first`, at
    `WHOLE` those that change X."""
    return _forward(interpret, given, flags)[0]


def _forward(interpret: bool, given: Chunks, flags: Array):
    n = given.own.shape[0]
    inputs = given._asdict() | {"flags": flags}
    outputs = {
        "before": tuple((n, *x.shape) for x in given.state),
        "steps": given.own.shape,
        "after": tuple(x.shape for x in given.state),
    }
    found = _launch(_forward_kernel, inputs, outputs, given, interpret)
    return (found["before"], found["steps"], found["after"]), (given, flags, found["before"], found["steps"])


def _forward_kernel(refs: SimpleNamespace) -> None:
    parts = _parts(refs.state)

    def step(c, state):
        if refs.first is not None:
            begins = refs.flags[BEGINS, c] != 0
            state = {(s, rows): jnp.where(begins, refs.first[s][at], state[s, rows]) for (s, rows), at in parts.items()}
        e = refs.own[c]
        for (s, rows), at in parts.items():
            refs.before[s][c, at] = state[s, rows]
            if refs.reads[s] is not None:
                e += product(refs.reads[s][c, :, at], state[s, rows])
        refs.steps[c] = e
        whole, behind = refs.flags[WHOLE, c] != 0, {}
        for (s, rows), at in parts.items():
            mixed = sum(refs.mix[c, s * len(refs.state) + r] * state[r, rows] for r in range(len(refs.state)))
            behind[s, rows] = jnp.where(whole, mixed - product(refs.writes[s][c, :, at].T, e), state[s, rows])
        return behind

    start = {(s, rows): refs.state[s][at] for (s, rows), at in parts.items()}
    state = jax.lax.fori_loop(0, refs.own.shape[0], step, start)
    for (s, rows), at in parts.items():
        refs.after[s][at] = state[s, rows]


def _backward(interpret: bool, kept: tuple, cotangents: tuple):
    given, flags, before, steps = kept
    d_before, d_steps, d_after = cotangents
    inputs = {"reads": given.reads, "writes": given.writes, "mix": given.mix, "flags": flags, "first": given.first}
    inputs |= {"d_before": d_before, "d_steps": d_steps, "d_after": d_after}
    outputs = {"d_start": tuple(x.shape for x in d_before), "d_own": d_steps.shape}
    found = _launch(_backward_kernel, inputs, outputs, given, interpret)
    d_start, d_own = found["d_start"], found["d_own"]

    flag = lambda kind: flags[kind, :, :, None, None, None] != 0
    handed = d_start if given.first is None else tuple(jnp.where(flag(BEGINS), 0.0, x) for x in d_start)
    behind = [jnp.concatenate([x[1:], last[None]]) for x, last in zip(handed, d_after, strict=True)]
    behind = [jnp.where(flag(WHOLE), x, 0.0) for x in behind]
    d_mix = jnp.stack([jnp.sum(g * x, axis=(-2, -1)) for g in behind for x in before], axis=-1)
    turned = lambda x: jnp.swapaxes(x, -2, -1)
    d_first = given.first and tuple(jnp.where(flag(BEGINS), x, 0.0).sum(axis=(0, 1)) for x in d_start)
    d_reads = tuple(r if r is None else product(d_own, turned(x)) for r, x in zip(given.reads, before, strict=True))
    d_writes = tuple(-product(steps, turned(g)) for g in behind)
    d_given = Chunks(tuple(x[0] for x in handed), d_first, d_own, d_reads, d_writes, d_mix)
    return d_given, np.zeros(flags.shape, jax.dtypes.float0)


def _backward_kernel(refs: SimpleNamespace) -> None:
    parts, n = _parts(refs.d_after), refs.d_own.shape[0]

    def step(i, behind):
        c = n - 1 - i
        whole = refs.flags[WHOLE, c] != 0
        through = {key: jnp.where(whole, g, 0.0) for key, g in behind.items()}
        de = refs.d_steps[c]
        for (s, rows), at in parts.items():
            de -= product(refs.writes[s][c, :, at], through[s, rows])
        refs.d_own[c] = de
        handed = {}
        for (s, rows), at in parts.items():
            mixed = sum(refs.mix[c, r * len(refs.d_after) + s] * through[r, rows] for r in range(len(refs.d_after)))
            dx = refs.d_before[s][c, at] + jnp.where(whole, mixed, behind[s, rows])
            if refs.reads[s] is not None:
                dx += product(refs.reads[s][c, :, at].T, de)
            refs.d_start[s][c, at] = dx
            handed[s, rows] = dx if refs.first is None else jnp.where(refs.flags[BEGINS, c] != 0, 0.0, dx)
        return handed

    jax.lax.fori_loop(0, n, step, {(s, rows): refs.d_after[s][at] for (s, rows), at in parts.items()})


carried.defvjp(_forward, _backward)


def _parts(matrices: Sequence[Any]) -> dict[tuple[int, int], pl.Slice]:
    """Rows of matrices in parts, by matrix and first row: registers do not hold longer products."""
    D = matrices[0].shape[0]
    size = min(D, ROWS)
    return {(s, rows): pl.ds(rows, size) for s in range(len(matrices)) for rows in range(0, D, size)}


def _launch(kernel: Callable, inputs: dict, outputs: dict, given: Chunks, interpret: bool) -> dict:
    """Arrays of float32 of the shapes of `outputs`. The kernel gets the references of a program by name."""
    (B, H, D, E), matrices, (n, _, _, b, _) = given.state[0].shape, len(given.state), given.own.shape
    is_shape = lambda x: isinstance(x, tuple) and isinstance(x[0], int)
    outputs = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), outputs, is_leaf=is_shape)
    of = lambda name, tree: jax.tree.map(lambda x: _spec(AXES[name], x.shape), tree)
    specs = lambda arrays: {name: of(name, tree) for name, tree in arrays.items()}
    products = matrices + sum(x is not None for x in given.reads)
    call = pl.pallas_call(
        lambda given, found: kernel(SimpleNamespace(**given, **found)),
        grid=(E // COLUMNS, H, B),
        in_specs=(specs(inputs),),
        out_specs=(specs(outputs),),
        out_shape=(outputs,),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * B * H * b * D * E * products,
            transcendentals=0,
            bytes_accessed=4 * sum(math.prod(x.shape) for x in jax.tree.leaves((inputs, outputs))),
        ),
        interpret=interpret,
    )
    return call(inputs)[0]


def _spec(axes: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    """One row, one head and some columns; the whole of the other axes."""
    block = tuple({"B": None, "H": None, "E": COLUMNS}.get(axis, size) for axis, size in zip(axes, shape, strict=True))
    return pl.BlockSpec(block, lambda j, h, i: tuple({"B": i, "H": h, "E": j}.get(axis, 0) for axis in axes))
