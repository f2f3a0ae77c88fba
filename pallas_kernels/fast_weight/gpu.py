"""A group of chunks of a fast weight of one matrix for GPUs (Pallas, Triton).

What needs no weights is computed by XLA for all chunks of the group at once: coefficients, the triangular systems of delta
rules. One kernel (`gpu_carry`) carries the weights through the chunks and leaves those before each of them, from which XLA
reads the outputs, again of all chunks at once: Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024. Groups
of many chunks (`kept` of `op.fast_weight`) give XLA more to do at a time. Compiled and interpreted; no GPU has run it yet.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.fast_weight.chunks import overlap, read, substituted
from pallas_kernels.fast_weight.coefficients import Coefficients, bounded
from pallas_kernels.fast_weight.gpu_carry import CHUNK, COLUMNS, HEAD, SMALLEST, Chunks, carried
from pallas_kernels.fast_weight.network import Steps, Weights, product
from pallas_kernels.fast_weight.tpu import BEGINS, LIVE, WHOLE, Given, Rule


def group(rule: Rule, given: Given, flags: Int[Array, "3 n B"]):
    """As `tpu.group`; the last of the pieces are `Coefficients`."""
    q, k, v, made = given.pieces
    if rule.overshoot is not None:
        made = _each(lambda made, k: bounded(made, _overlap(k), rule.overshoot))(made, k)
    state = tuple(x.matrices[0] for x in given.state if x is not None)
    first = given.first and tuple(x.matrices[0] for x in given.first if x is not None)
    own, reads = _errors(rule, made, k, v, len(state))
    behind = (made.state, made.momentum)[: len(state)]
    writes = tuple(k * jnp.swapaxes(rows.gain, -2, -1) for rows in behind)
    mix = jnp.concatenate([x for rows in behind for x in (rows.keep, rows.carry)[: len(state)]], axis=-1)
    live = flags[LIVE, :, :, None, None] != 0
    flags = jnp.stack([flags[BEGINS], flags[WHOLE] * flags[LIVE]])
    before, e, after = carried(rule.interpret, Chunks(state, first, own, reads, writes, mix), flags)

    def found(matrices, rows, q, k, e, v):
        weights, momentum = _weights(matrices)
        out = read(rule.network, weights, momentum, rows, Steps((k,), (e,), None), q, None)
        hebbian = made.gradient is None and rule.network.target == "hebbian"
        loss = -jnp.sum(product(k, weights.matrices[0]) * v, axis=-1) if hebbian else jnp.sum(e**2, axis=-1) / 2
        return out, loss

    out, loss = _each(found)(before, made.read, q, k, e, v)
    return jnp.where(live[..., None], out, 0.0), jnp.where(live, loss, 0.0), _weights(after)


def refused(rule: Rule, given: Given, chunks: int) -> str | None:
    """Why groups of chunks, however many, are not for the kernels, if they are not."""
    weights, momentum = given.state
    if len(weights.matrices) > 1:
        return f"memories of {len(weights.matrices)} matrices: the GPU kernel takes one"
    if weights.biases or rule.network.output != "plain":
        return f"biases or output {rule.network.output!r}: the GPU kernel takes a matrix alone"
    if rule.norm is not None:
        return f"norm = {rule.norm}: the GPU kernel has no bound of it"
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves(given)):
        return "arrays wider than float32"
    b, (D, E) = given.pieces[0].shape[3], weights.matrices[0].shape[2:]
    fits = lambda size, most: SMALLEST <= size <= most and not size & (size - 1)
    if not fits(b, CHUNK):
        return f"chunks of {b} tokens: the GPU kernel takes powers of two from {SMALLEST} to {CHUNK}"
    most = HEAD if momentum is None else HEAD // 2
    if not fits(D, most) or E % COLUMNS:
        return f"a matrix of {D} by {E}: expected a power of two from {SMALLEST} to {most} by a multiple of {COLUMNS}"
    return None


def _errors(rule: Rule, made: Coefficients, k: Array, v: Array, matrices: int) -> tuple[Array, tuple[Array | None, ...]]:
    """Gradients as an affine function of the weights, and of the momentum, before the chunk."""
    place = made.gradient
    if place is None:
        return -v, (None if rule.network.target == "hebbian" else k, None)[:matrices]
    system = jnp.tril(place.gain * product(k, jnp.swapaxes(k, -2, -1)), -1)
    rows = [-v, *(x[..., None] * k for x in (place.keep, place.carry)[:matrices])]
    solved = _each(substituted)(system, jnp.concatenate(rows, axis=-1))
    own, *reads = jnp.split(solved, [v.shape[-1] + n * k.shape[-1] for n in range(matrices)], axis=-1)
    return own, tuple(reads)


def _overlap(k: Array) -> Array:
    """Of one matrix, whose steps reach as far as they are."""
    return overlap(Steps((k,), (), None, jnp.ones((len(k), 1), k.dtype)))


def _weights(matrices: tuple[Array, ...]) -> tuple[Weights, Weights | None]:
    weights, *momentum = (Weights((x,)) for x in matrices)
    return weights, momentum[0] if momentum else None


def _each(run: Callable) -> Callable:
    """Of every chunk, row and head."""
    return jax.vmap(jax.vmap(jax.vmap(run)))
