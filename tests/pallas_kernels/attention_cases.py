"""Tokens, arrays and comparisons that the tests of every form of tile attention share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from lcx.attention.mask import Beyond, Causal, Chunk, Hide, Sink, Window, Within
from pallas_kernels.tile_attention import op, reference
from pallas_kernels.tile_attention.tile_list import TileList, verified
from pallas_kernels.tile_attention.tokens import Tokens, pad_tokens
from pallas_kernels.tile_attention.tokens import tiles as statistics

MASKS = [
    Causal(),
    Window(size=40) | (Sink(size=3) & Hide(query_role=1, key_role=0)),
    Within(size=90) & Chunk(size=50),
    Beyond(size=30),
]
NAMES = ("out", "lse", "dq", "dk", "dv")


def random_tokens(rng, rows, length, kind):
    """`packed`: documents and padding; `special`: shared, readers, roles too; `shuffled`: arrays in any order.

    `padding`: rows of nothing else; `single`: one document a row, of any length.
    """
    segments = np.sort(rng.integers(0 if kind == "packed" else -2, 5, (rows, length)), axis=1)
    if kind == "single":
        segments = (np.arange(length) < rng.integers(0, length + 1, (rows, 1))).astype(int)
    index = np.zeros_like(segments)
    for row, own in zip(index, segments, strict=True):
        for segment in set(own):
            row[own == segment] = np.arange((own == segment).sum())
    order, roles = index, rng.integers(0, 2, index.shape)
    if kind == "shuffled":
        order = np.where(rng.random((rows, 1)) < 0.5, 0, index // 3)
        places = np.argsort(rng.random(index.shape), axis=1)
        index, order, segments = (np.take_along_axis(x, places, 1) for x in (index, order, segments))
    if kind == "padding":
        segments[: rows // 2] = 0
    return Tokens(*(jnp.asarray(x, jnp.int32) for x in (index, order, segments, roles)))


def whole_document(rows, length):
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    return Tokens(index, index, jnp.ones_like(index), jnp.zeros_like(index))


def arrays(rng, B, T, S, H, K, D, E, dtype=jnp.float32):
    """q, k, v and the cotangents of out and lse."""
    qkv = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, E)))
    return (*qkv, *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, H, E), (B, T, H))))


def listed(groups, T, S, H=4, K=2, width=64):
    """One document in bfloat16, its tokens and cotangents; a list of some causal tiles of 128 x 128; the pairs it lists."""
    rng = np.random.default_rng(groups)
    q_tokens, k_tokens = whole_document(1, T), whole_document(1, S)
    nq, nk = -(-T // 128), -(-S // 128)
    seen = rng.random((1, groups, nq, nk)) < 0.6
    seen[..., 0, :] = False  # rows without a tile
    seen[..., 1, 0] = True  # a full one
    places = np.argsort(~seen.reshape(1, groups, -1), axis=-1, kind="stable")
    rows, cols, count = (jnp.asarray(x, jnp.int32) for x in (places // nk, places % nk, seen.sum((2, 3))))
    tiles = TileList(rows, cols, jnp.zeros(places.shape, jnp.int8), count)
    sides = (statistics(pad_tokens(side, 128), 128) for side in (q_tokens, k_tokens))
    pairs = jnp.asarray(seen.repeat(128, 2).repeat(128, 3)[:, :, :T, :S])
    return (
        (*arrays(rng, 1, T, S, H, K, width, width, jnp.bfloat16), q_tokens, k_tokens),
        verified(tiles, Causal(), *sides),
        pairs,
    )


def with_gradient(form):
    def run(q, k, v, d_out, d_lse, q_tokens, k_tokens):
        (out, lse), pull = jax.vjp(lambda q, k, v: form(q, k, v, q_tokens, k_tokens), q, k, v)
        return out, lse, *pull((d_out, jnp.where(lse == -jnp.inf, 0, d_lse)))

    return jax.jit(run)


def compare(got, expected, tolerance):
    for name, value, other in zip(NAMES, got, expected, strict=True):
        value, other = np.asarray(value, np.float32), np.asarray(other, np.float32)
        largest = np.abs(other[np.isfinite(other)]).max(initial=0)
        np.testing.assert_allclose(value, other, rtol=0, atol=tolerance * largest, err_msg=name)


class OneForm(op.Fold):
    """A module's two functions as `op.attention` takes them."""

    def __init__(self, form, **options):
        self.form, self.options = form, options

    def forward(self, *given):
        return self.form.forward(*given, **self.options)

    def backward(self, *given):
        return self.form.backward(*given, **self.options)


def beside_the_reference(form, mask, softcap=None, **options):
    """(the interpreted form, the dense reference), each with its gradient."""
    logits = {"mask": mask, "scale": 0.2, "softcap": softcap}
    fold = OneForm(form, **logits, **options, interpret=True)
    return tuple(map(with_gradient, (functools.partial(op.attention, fold), functools.partial(reference.forward, **logits))))


def described(kind):
    """A context in which a program is lowered for a GPU that is not here."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("one",), (AxisType.Auto,), abstract_device=device))
