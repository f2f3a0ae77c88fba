"""Coded slots, tokens and queries that the tests of every form of quantised attention share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.mask import Causal, Mask
from lcx.cache.codecs.codec import Codec
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.plain import Plain
from lcx.cache.codecs.scaled import Fp8, Int8
from pallas_kernels import angles
from pallas_kernels.quantized_attention import formats
from pallas_kernels.quantized_attention.formats import Plan, Slots
from pallas_kernels.tile_attention.tokens import Tokens

CODECS = {
    "plain": Plain(),
    "int8": Int8(),
    "fp8": Fp8(),
    **{f"groups {bits}": IntGroups(bits=bits, group=32) for bits in (2, 3, 4, 8)},
    "groups of all channels": IntGroups(bits=4, group=128),
    **{f"kivi {bits}": KIVI(bits=bits, group=32) for bits in (2, 3, 4, 8)},
    "kivi of 64": KIVI(bits=2, group=64),
    **{f"kvquant {bits}": KVQuant(codebook="uniform", bits=bits) for bits in (2, 3, 4)},
    "kvquant of many outliers": KVQuant(codebook="uniform", bits=3, outliers=0.1),
    "kvquant of none": KVQuant(codebook="uniform", bits=3, outliers=0.0),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """rotary: channels that are rotated in the kernel, of raw keys."""

    codec: Codec
    S: int = 768
    T: int = 1
    K: int = 2
    group: int = 2
    D: int = 128
    mask: Mask = Causal()
    softcap: float | None = None
    sloped: bool = False
    extra: bool = False
    by_head: bool = False
    rotary: int = 0
    tables: bool = False  # that rotate, in place of positions
    pairing: str = "half"
    dtype: type = jnp.float32


def made(case: Case, seed=0):
    """(plan, q, slots, query tokens, slopes), and the keys and values that the codec itself decodes. Two rows: one whose slots
    are nearly full, and one that is padded on the left and holds few; empty slots hold garbage, NaN where a number can be one.
    """
    rng = np.random.default_rng(seed)
    B, S, K, D, T = 2, case.S, case.K, case.D, case.T
    heads = K if case.by_head else 1
    used = np.array([S - 37, min(S, 333)])
    there = np.arange(S) < used[:, None, None]
    there = np.broadcast_to(there, (B, heads, S)) & (rng.random((B, heads, S)) < 0.95)
    index = np.where(there, np.cumsum(there, axis=2) - 1, rng.integers(0, 99, there.shape))
    k_tokens = Tokens(*(jnp.asarray(x, jnp.int32) for x in (index, index, there, rng.integers(0, 2, index.shape))))
    place = np.arange(T) + S
    own = np.ones((B, T), int)
    own[1, : T // 2] = 0
    q_tokens = Tokens(*(jnp.asarray(np.broadcast_to(x, (B, T)), jnp.int32) for x in (place, place, own, 0)))
    sides, decoded = [], []
    coders = case.codec.keys, case.codec.values
    for coder, known in zip(coders, case.codec.tables(0, K, D, D), strict=True):
        tables = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape)), known)
        x = rng.normal(size=(B, K, S, D)) * rng.lognormal(size=D) + rng.normal(size=D)
        codes = coder.encode(jnp.asarray(x, jnp.float32), tables)
        garbage = jax.tree.map(lambda leaf: _garbage(leaf, there, S, rng), codes)
        decoded.append(coder.decode(codes, tables))
        sides.append(coder.format(garbage, tables))
    turning, tables, pairs = None, (None, None), case.rotary // 2
    if pairs:
        positions = jnp.asarray(np.where(there, rng.integers(0, 900_000, there.shape), 0), jnp.float32).reshape(B * heads, S)
        parts = angles.parts(500000.0 ** (-np.arange(pairs) / pairs) / (2 * np.pi))
        turning = formats.Turning(positions, jnp.asarray(np.stack(parts), jnp.float32), jnp.float32(1.1))
    if case.tables:
        turning, tables = None, turning.tables()
    slots = Slots(
        sides[0][1],
        sides[1][1],
        k_tokens,
        jnp.asarray(used, jnp.int32),
        jnp.where(there, jnp.asarray(rng.exponential(size=(B, K, S)), jnp.float32), jnp.nan) if case.extra else None,
        *tables,
        turning,
    )
    q = jnp.asarray(rng.normal(size=(B, T, K * case.group, D)), case.dtype)
    slopes = jnp.asarray(rng.exponential(size=q.shape[:3]) / 99, jnp.float32) if case.sloped else None
    plan = Plan(sides[0][0], sides[1][0], case.mask, 0.05, case.softcap, pairing=case.pairing)
    return (plan, q, slots, q_tokens, slopes), decoded


def _garbage(leaf, there, S, rng):
    """NaN or any bits in what belongs to empty slots alone."""
    leaf = np.array(leaf)
    (B, K, n), packed = leaf.shape[:3], leaf.dtype == np.uint32
    blocks = S // 32 if packed else n
    empty = ~there.reshape(*there.shape[:2], blocks, S // blocks).any(axis=3)
    empty = np.broadcast_to(np.repeat(empty, n // blocks, axis=2), (B, K, n))
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf[empty] = np.nan
    elif packed:
        leaf[empty] = rng.integers(0, 2**32, leaf[empty].shape, np.uint32)
    return jnp.asarray(leaf)


def close(got, expected, tolerance):
    for name, value, other in zip(("out", "lse"), got, expected, strict=True):
        value, other = np.asarray(value), np.asarray(other)
        most = np.abs(other[np.isfinite(other)]).max(initial=0)
        np.testing.assert_allclose(value, other, rtol=0, atol=tolerance * most, err_msg=name)
