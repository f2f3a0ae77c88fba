"""A cache driven by random tokens, pass after pass, beside the reference attention over what it says it holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.batch import causal_info
from lcx.cache.cache import At
from lcx.cache.scorers.scorer import Asked, Rule
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate

HEADS, KV_HEADS, DIM, VALUE, SCALE = 4, 2, 8, 6, 0.4
FREQUENCIES = Rope().frequencies(DIM, 128)


def passes(lengths, rows=2, seed=0, padding=0):
    """(q, k, v, info) of each pass; of the first row's first pass `padding` tokens on the left are none."""
    rng = np.random.default_rng(seed)
    seen = np.zeros(rows, np.int32)
    for n in lengths:
        segments = np.ones((rows, n), np.int32)
        segments[0, : padding if not seen.any() else 0] = 0
        make = lambda heads, size, n=n: jnp.asarray(rng.normal(size=(rows, n, heads, size)), jnp.float32)
        yield make(HEADS, DIM), make(KV_HEADS, DIM), make(KV_HEADS, VALUE), causal_info(segments, start=jnp.asarray(seen))
        seen = seen + (segments != 0).sum(axis=1).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("cache", "mask", "bias", "softcap"))
def step(cache, state, q, k, v, info, mask=Causal(), bias=None, softcap=None):
    """(state, out, lse, what is held before it) of a pass."""
    before = cache.read(state, FREQUENCIES)
    given = cache.append(state, k, v, info, FREQUENCIES)
    turned = rotate(q, info.positions, FREQUENCIES)
    options = {"mask": mask, "scale": SCALE, "softcap": softcap, "bias": bias}
    out, lse = cache.attend(given, turned, info, frequencies=FREQUENCIES, **options)
    asked = Asked(q=turned, raw=q, out=out, lse=lse, info=info.filled(), output=jnp.ones((HEADS, VALUE, 5)))
    return cache.prune(given, asked, frequencies=FREQUENCIES, rule=Rule(**options)), out, lse, before


def run(cache, given, length=96, each=None, **options):
    """The state after all passes. each: called with (state, q, k, v, info, out, lse, before) after every pass."""
    given = list(given)
    state = cache.init(len(given[0][0]), length, KV_HEADS, DIM, VALUE, jnp.float32, at=At(heads=HEADS))
    for q, k, v, info in given:
        state, out, lse, before = step(cache, state, q, k, v, info, **options)
        if each is not None:
            each(state, q, k, v, info, out, lse, before)
    return state


def expected(q, k, v, info, before, mask=Causal(), bias=None, softcap=None):
    """The reference over what was held and the pass itself."""
    held_k, held_v, held_info = before
    rows, G = len(q), len(held_k) // len(q)
    apart = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], G, -1, x.shape[3]), 2, 1).reshape(
        rows * G, x.shape[1], -1, x.shape[3]
    )
    turned = rotate(q, info.positions, FREQUENCIES), rotate(k, info.positions, FREQUENCIES, side="key")
    q, k, v = map(apart, (*turned, v))
    repeat = lambda x: jnp.repeat(x, G, axis=0)
    info = jax.tree.map(repeat, info.filled())
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    options = {"mask": mask, "scale": SCALE, "softcap": softcap, "bias": bias, "backend": "reference"}
    out, lse = attend(q, join(held_k, k), join(held_v, v), info, jax.tree.map(join, held_info, info), **options)
    back = lambda x: jnp.moveaxis(x.reshape(rows, G, *x.shape[1:]), 1, 2).reshape(rows, x.shape[1], HEADS, *x.shape[3:])
    return back(out), back(lse)


def held_indices(cache, state):
    """Indices of the tokens that each row's key heads hold, sorted: [rows][heads or one list]."""
    info = state.held.info
    index, there = np.asarray(info.index), np.asarray(info.segments) != 0
    return [[sorted(index[b, g][there[b, g]].tolist()) for g in range(index.shape[1])] for b in range(len(index))]
