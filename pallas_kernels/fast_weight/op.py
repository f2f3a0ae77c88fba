"""A fast weight over rows of tokens: a scan over chunks, the last of which may be shorter; and its next token alone.

What is kept for the backward pass are the weights before every `kept` chunks; the chunks between are computed anew.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.fast_weight import gpu, tpu
from pallas_kernels.fast_weight.chunks import Held, behind, overlap, read
from pallas_kernels.fast_weight.chunks import chunk as one_chunk
from pallas_kernels.fast_weight.coefficients import Coefficients, bounded, packed
from pallas_kernels.fast_weight.network import Fixed, Network, Steps, Weights, steps
from pallas_kernels.fast_weight.over_mesh import Axes, over_mesh
from pallas_kernels.grouped_scan import chosen, grouped_scan
from pallas_kernels.target import log_once, platform

Form = Literal["xla", "tpu", "gpu"]
KERNELS = {"tpu": tpu, "gpu": gpu}
Builder = Callable[..., Coefficients]
Gates = tuple[Float[Array, "B T H ..."] | None, ...]


class State(NamedTuple):
    """weights, momentum: float32, leaves [B,H,...]; momentum None where the coefficients have none."""

    weights: Weights
    momentum: Weights | None = None


class Course(NamedTuple):
    """Which chunks of a row begin with `first`, leaves [H,...]; which are whole, and so change the state; which have tokens in
    some row.

    A chunk that is not whole is read by its tokens and leaves the state at its own start.
    """

    begins: Bool[Array, "B n"]
    whole: Bool[Array, "B n"]
    live: Bool[Array, "n"]
    first: State


class Open(NamedTuple):
    """A chunk that is not whole yet: steps [B,H,b,...] and gates [B,H,b,...] of its tokens, in the rows that are `filled`."""

    steps: Steps
    gates: tuple[Array | None, ...]
    filled: Bool[Array, "B b"]


class FastWeight(NamedTuple):
    """What a fast weight is. coefficients: of the gates of a chunk, leaves [B,H,b,...]. fixed: leaves [H,...]. overshoot: of a
    chunk's steps (`coefficients.bounded`). norm: the largest Frobenius norm of a matrix, and of the gain, behind a whole chunk,
    which are scaled down to it. None is any."""

    network: Network
    coefficients: Builder
    fixed: Fixed | None = None
    overshoot: float | None = None
    norm: float | None = None


def fast_weight(
    kind: FastWeight,
    state: State,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    gates: Gates,
    *,
    chunk: int,
    kept: int = 4,
    course: Course | None = None,
    form: Form | None = None,
    axes: Axes = ((), ()),
) -> tuple[Float[Array, "B T H E"], State, Float[Array, "B T H"]]:
    """(out, state behind the row, loss of each token at the weights where its gradient was taken), float32 or wider.

    gates: what `kind.coefficients` makes those of a chunk of, each [B,T,H,...] or None, handed over as [B,H,b,...]. course:
    None is one run through all chunks; else T is a multiple of `chunk`. form: of groups of chunks; None is the kernel where the
    program is for a TPU whose memory it fits. That for GPUs, which no GPU has timed yet, has to be named. axes: of the mesh,
    that share out rows and heads. Raises ValueError where the GPU kernel is named and `gpu.refused` has a reason.
    """
    if chunk < 1 or kept < 1:
        raise ValueError(f"fast_weight: chunk = {chunk}, kept = {kept}: expected at least 1 of each")
    length = q.shape[1]
    whole = length // chunk
    if course is not None and length % chunk:
        raise ValueError(f"fast_weight: {length} tokens: expected a multiple of chunk = {chunk} where a course is given")
    arrays = jax.tree.map(heads_first, (q, k, v, gates))
    cut = lambda x: jnp.moveaxis(x[:, :, : whole * chunk].reshape(*x.shape[:2], whole, chunk, *x.shape[3:]), 2, 0)
    outs, losses = [], []
    if whole:
        pieces = jax.tree.map(cut, arrays)
        flags = None if course is None else (course.begins.T, course.whole.T, course.live)
        first = None if course is None else course.first
        step = functools.partial(_step, kind, first)
        scan = jax.lax.scan
        form = _form(form, kind, state, pieces, kept)
        if form != "xla":
            scan = functools.partial(_in_kernel, form, kind, first, axes)
        state, found = grouped_scan(step, state, (pieces, flags), group=kept, scan=scan)
        join = lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], whole * chunk, *x.shape[4:])
        out, loss = jax.tree.map(join, found)
        outs.append(out)
        losses.append(loss)
    if length % chunk:
        state, (out, loss) = _step(kind, None, state, (jax.tree.map(lambda x: x[:, :, whole * chunk :], arrays), None))
        outs.append(out)
        losses.append(loss)
    tokens_first = lambda parts: jnp.moveaxis(jnp.concatenate(parts, axis=2), 1, 2)
    return tokens_first(outs), state, tokens_first(losses)


def _form(asked: Form | None, kind: FastWeight, state: State, pieces: tuple, kept: int) -> Form:
    form = asked or ("tpu" if platform() == "tpu" else "xla")
    if form == "xla" or asked == "tpu":
        return form
    refused = KERNELS[form].refused(_rule(form, kind), jax.eval_shape(lambda: _given(form, kind, None, state, pieces)), kept)
    if asked and refused:
        raise ValueError(f"fast_weight: form = {asked!r}: {refused}")
    log_once("fast_weight: XLA form, " + refused if refused else f"fast_weight: {form.upper()} kernel")
    return "xla" if refused else form


def _rule(form: Form, kind: FastWeight) -> tpu.Rule:
    return tpu.Rule(kind.network, kind.overshoot, kind.norm, platform() != form)


def _given(form: Form, kind: FastWeight, first: State | None, state: State, pieces: tuple) -> tpu.Given:
    *rows, gates = pieces
    made = kind.coefficients(*gates)
    made = packed(made) if form == "tpu" else made
    return tpu.Given(tuple(state), first and tuple(first), kind.fixed, (*rows, made))


def _in_kernel(form: Form, kind: FastWeight, first: State | None, axes: Axes, step: Callable, state: State, parts: tuple):
    """`jax.lax.scan(step, state, parts)` as one kernel."""
    pieces, flags = parts
    n, rows = pieces[0].shape[:2]
    begins, whole, live = (False, True, True) if flags is None else (*flags[:2], flags[2][:, None])
    flags = jnp.stack([jnp.broadcast_to(flag, (n, rows)) for flag in (begins, whole, live)]).astype(jnp.int32)
    run = over_mesh(functools.partial(KERNELS[form].group, _rule(form, kind)), axes)
    out, loss, after = run(_given(form, kind, first, state, pieces), flags)
    return State(*after), (out, loss)


def heads_first(x: Float[Array, "B T H ..."]) -> Float[Array, "B H T ..."]:
    """In float32 or wider."""
    return jnp.moveaxis(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, 1)


def run_chunk(
    kind: FastWeight, state: State, arrays: tuple, held: Held | None = None
) -> tuple[Float[Array, "B H b E"], State, Float[Array, "B H b"], Steps]:
    """(out, state behind, losses, steps) of one chunk of all rows and heads; arrays: q, k, v and gates, [B,H,b,...]."""
    q, k, v, gates = arrays
    made = kind.coefficients(*gates)

    def run(weights, momentum, made, q, k, v, fixed, held):
        return one_chunk(kind.network, weights, momentum, made, q, k, v, fixed, overshoot=kind.overshoot, held=held)

    fixed = None if kind.fixed is None else 0
    filled = None if held is None else Held(0, None)
    over_heads = jax.vmap(run, in_axes=(0, 0, 0, 0, 0, 0, fixed, filled))
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, 0, 0, 0, None, None if held is None else 0))
    out, weights, momentum, loss, taken = over_rows(state.weights, state.momentum, made, q, k, v, kind.fixed, held)
    return out, scaled_down(State(weights, momentum), kind.norm), loss, taken


def scaled_down(state: State, most: float | None) -> State:
    """With leaves [B,H,...] whose norm is at most `most`."""
    if most is None:
        return state

    def scaled(x):
        square = jnp.sum(x**2, axis=tuple(range(2, x.ndim)), keepdims=True)
        over = square > most**2
        return x * jnp.where(over, most * jax.lax.rsqrt(jnp.where(over, square, 1.0)), 1.0)

    return jax.tree.map(scaled, state)


def _step(kind: FastWeight, first: State | None, state: State, given):
    arrays, flags = given
    if flags is None:
        out, state, loss, _ = run_chunk(kind, state, arrays)
        return state, (out, loss)
    begins, whole, live = flags
    start = chosen(begins, first, state)

    def run(start):
        out, after, loss, _ = run_chunk(kind, start, arrays)
        return chosen(whole, after, start), (out, loss)

    def skip(start):
        v = arrays[2]
        return start, (jnp.zeros_like(v), jnp.zeros_like(v[..., 0]))

    return jax.lax.cond(live, run, skip, start)


def next_token(
    kind: FastWeight, state: State, opened: Open, slot: Int[Array, "B"], arrays: tuple
) -> tuple[Float[Array, "B H 1 E"], Float[Array, "B H 1"], Open]:
    """(out, loss, open chunk with it) of one token a row at its slot of the open chunk; arrays: q, k, v, gates, [B,H,1,...].

    `state` is that at the chunk's start and stays so: `absorbed` gives it behind a whole chunk.
    """
    q, k, v, gates = arrays
    places = jnp.arange(opened.filled.shape[1])

    def put(old, new, slot):  # one row of [b,...]
        return jnp.where((places == slot).reshape(-1, *[1] * (old.ndim - 1)), new, old)

    over_heads = lambda f: jax.vmap(f, in_axes=(0, 0, None))
    gates = jax.tree.map(lambda old, new: jax.vmap(over_heads(put))(old, new, slot), opened.gates, gates)

    def run(given, fixed, slot):
        weights, momentum, made, old, q, k, v = given
        row = lambda rows: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), rows)
        if made.gradient is None:
            new, loss = steps(kind.network, weights, k, v, fixed, reaching=kind.overshoot is not None)
        else:
            e = read(kind.network, weights, momentum, row(made.gradient), old, k, fixed) - v
            new, loss = Steps((k,), (e,), None), jnp.sum(e**2, axis=-1) / 2
        taken = jax.tree.map(lambda old, new: put(old, new, slot), old, new)
        made = made if kind.overshoot is None else bounded(made, overlap(taken), kind.overshoot)
        return read(kind.network, weights, momentum, row(made.read), taken, q, fixed), loss, taken

    heads = jax.vmap(run, in_axes=(0, None if kind.fixed is None else 0, None))
    given = (state.weights, state.momentum, kind.coefficients(*gates), opened.steps, q, k, v)
    out, loss, taken = jax.vmap(heads, in_axes=(0, None, 0))(given, kind.fixed, slot)
    return out, loss, Open(taken, gates, opened.filled | (places == slot[:, None]))


def absorbed(kind: FastWeight, state: State, opened: Open) -> State:
    """The state behind a chunk all of whose rows are filled."""

    def of_head(weights, momentum, made, taken):
        made = made if kind.overshoot is None else bounded(made, overlap(taken), kind.overshoot)
        return State(*behind(weights, momentum, made, taken))

    made = kind.coefficients(*opened.gates)
    after = jax.vmap(jax.vmap(of_head))(state.weights, state.momentum, made, opened.steps)
    return scaled_down(after, kind.norm)


def empty(kind: FastWeight, weights: Weights, gates: Gates, rows: int, chunk: int) -> Open:
    """An open chunk of `rows` rows without tokens. weights: leaves [H,...]; gates: of anything, [B,T,H,...]."""
    heads = weights.matrices[0].shape[0]
    blank = lambda size: jnp.zeros((rows, heads, chunk, size), jnp.float32)
    inputs = tuple(blank(matrix.shape[1]) for matrix in weights.matrices)
    gradients = tuple(blank(matrix.shape[2]) for matrix in weights.matrices)
    gain = None if weights.gain is None else blank(weights.gain.shape[1])
    reach = None if kind.overshoot is None else blank(len(weights.matrices))
    held = jax.tree.map(lambda x: jnp.zeros((rows, heads, chunk, *x.shape[3:]), jnp.float32), gates)
    return Open(Steps(inputs, gradients, gain, reach), held, jnp.zeros((rows, chunk), bool))
