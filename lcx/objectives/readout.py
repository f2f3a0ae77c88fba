"""What a loss reads of the logits of a long row, the head applied to a few tokens and a part of the vocabulary at a time.

Logits [B,T,V] never exist: of each token and each part of the vocabulary there remain its logsumexp, the target's logit and
the top logit with its place; parts are joined by logsumexp, sum and maximum. A device gathers the head, and adds its gradient
up in float32, one part at a time (lcx/parallel/tokenwise.py). Where mesh axes share out the vocabulary a part takes as much
of every share, so none of it moves.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.parallel.rules import Rules, ambient_mesh, shard
from lcx.parallel.tokenwise import Weights, tokenwise, weights_of


class Readout(NamedTuple):
    """lse: logsumexp of the logits. target: the target's logit. top: the first column of the highest. known: the target is a
    column; else its logit is given as 0."""

    lse: Float[Array, "B T"]
    target: Float[Array, "B T"]
    top: Int[Array, "B T"]
    known: Bool[Array, "B T"]


def readout(
    model: nnx.Module, hidden: Float[Array, "B T M"], targets: Int[Array, "B T"], *, chunk: int, parts: int = 1
) -> Readout:
    """Of `model.logits(hidden)`, at most `chunk` tokens of each row of a device and 1 / `parts` of the vocabulary at a time.

    Raises ValueError if the vocabulary does not divide into the parts.
    """
    rules, compute = model.spec.rules, model.spec.compute
    vocab = jax.eval_shape(model.logits, jax.ShapeDtypeStruct((1, 1, hidden.shape[-1]), hidden.dtype)).shape[-1]
    known = (targets >= 0) & (targets < vocab)
    head = weights_of(model, _read, hidden, targets)
    read = functools.partial(tokenwise, _read, chunk=chunk, rules=rules, compute=compute)
    if parts == 1:
        lse, target, _, top = read(head, hidden, targets)
        return Readout(lse, target, top, known)
    share, size = _sizes(vocab, parts, rules)
    offset = jnp.arange(parts)[:, None, None] * size
    within = targets % share - offset
    places = jnp.where(known & (within >= 0) & (within < size), targets // share * size + within, -1)
    wide = hidden.astype(jnp.float32)  # so that its gradients from the parts are summed in float32
    step = lambda _, part: (None, read(head._replace(arrays=part[0]), wide, part[1]))
    _, (lse, target, best, at) = jax.lax.scan(step, None, (_parts(head, parts, share, rules), places))
    column = at // size * share + offset + at % size
    top = jnp.where(best == best.max(axis=0), column, vocab).min(axis=0)
    return Readout(jax.nn.logsumexp(lse, axis=0), target.sum(axis=0), top, known)


def _read(model: nnx.Module, hidden: Float[Array, "B t M"], places: Int[Array, "B t"]):
    """(logsumexp, logit at the place or 0, highest logit, its place) of the columns of one part."""
    logits = model.logits(hidden)
    chosen = jnp.arange(logits.shape[-1]) == places[..., None]  # not a gather: it stays local where the vocabulary is sharded
    target = jnp.where(chosen, logits, 0).sum(axis=-1)
    seen = jax.lax.stop_gradient(logits)
    return jax.nn.logsumexp(logits, axis=-1), target, seen.max(axis=-1), seen.argmax(axis=-1)


def _sizes(vocab: int, parts: int, rules: Rules) -> tuple[int, int]:
    """Columns of a share of the vocabulary, and those of it that a part takes."""
    mesh = ambient_mesh()
    shares = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in rules.vocab)
    if vocab % (shares * parts):
        raise ValueError(f"readout: a vocabulary of {vocab} does not divide into {parts} parts of each of {shares} shares")
    return vocab // shares, vocab // shares // parts


def _parts(head: Weights, parts: int, share: int, rules: Rules) -> tuple[Array, ...]:
    """Its arrays with a leading axis of parts; those without the vocabulary are repeated."""

    def cut(leaf, axes):
        if "vocab" not in axes:
            return jnp.broadcast_to(leaf, (parts, *leaf.shape))
        at = axes.index("vocab")
        before, after = leaf.shape[:at], leaf.shape[at + 1 :]
        leaf = jnp.moveaxis(leaf.reshape(*before, -1, parts, share // parts, *after), at + 1, 0)
        return shard(leaf.reshape(parts, *before, -1, *after), rules, None, *axes)

    return tuple(map(cut, head.arrays, head.axes))
