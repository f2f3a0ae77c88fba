"""Attention to coded slots for GPUs (Pallas, Triton): Flash-Decoding (2023), slots split among programs, then merged by lse.

A program has the R queries of one key head and a part of its slots, which it reads as codes and decodes in registers
(`gpu_formats`), a tile at a time, up to the last used one. Interpreted and lowered; no GPU has run it yet.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from pallas_kernels import angles
from pallas_kernels.quantized_attention.formats import (
    ChannelGroups,
    Codebook,
    Pairing,
    Plan,
    Slots,
    TokenGroups,
    channels,
    widened,
)
from pallas_kernels.quantized_attention.gpu_formats import numbers, operands, table
from pallas_kernels.quantized_attention.packing import BLOCK
from pallas_kernels.quantized_attention.reference import partners
from pallas_kernels.tile_attention.scores import LOG2E, LOW, Scores, dot, sees_nothing
from pallas_kernels.tile_attention.tokens import Tokens, distance

ROWS = 64  # of queries of a key head, at most
SMALLEST = 16  # rows and channels: the least that a matrix product takes
HEAD = 256  # channels, at most
OUTLIERS = 32
PROGRAMS = 264  # two for each multiprocessor of a Hopper GPU
WARPS, STAGES = 4, 2


def refused(plan: Plan, q: Float[Array, "B T H D"], slots: Slots) -> str | None:
    """Why the kernel does not take a call, if it does not."""
    rows = q.shape[1] * q.shape[2] // jax.tree.leaves(slots.k)[0].shape[1]
    widths = channels(slots.k), channels(slots.v)
    if any(not SMALLEST <= n <= HEAD or n & (n - 1) for n in widths):
        return f"heads of {widths}: the GPU kernel takes powers of two from {SMALLEST} to {HEAD}"
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not 0 < rows <= ROWS:
        return f"{rows} queries of a key head in {q.dtype}: the GPU kernel takes 1 to {ROWS}, in bfloat16 or float32"
    for form, arrays in ((plan.keys, slots.k), (plan.values, slots.v)):
        if isinstance(form, ChannelGroups | TokenGroups) and form.size & (form.size - 1):
            return f"{form}: the GPU kernel takes groups of a power of two"
        if isinstance(form, Codebook) and len(arrays.place) > OUTLIERS:
            return f"{len(arrays.place)} outliers a token: the GPU kernel takes at most {OUTLIERS}"
    return None


def forward(
    plan: Plan,
    q: Float[Array, "B T H D"],
    slots: Slots,
    q_tokens: Tokens,
    slopes: Float[Array, "B T H"] | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32."""
    if (reason := refused(plan, q, slots)) is not None:
        raise ValueError(reason)
    slots = slots.own
    (B, T, H, D), S, E = q.shape, slots.tokens.index.shape[2], channels(slots.v)
    K, bk = jax.tree.leaves(slots.k)[0].shape[1], 2 * BLOCK if S % (2 * BLOCK) == 0 else BLOCK
    tiles = -(-S // bk)
    parts = min(tiles, -(-PROGRAMS // (B * K)))
    given = _queries(q, q_tokens, slopes, K, partners(q, slots.pairs, plan.pairing) if slots.pairs else None)
    R = given["q"].shape[2]
    given |= {name: _filled(x, S, bk) if along else x for name, (x, along) in _held(plan, slots, D).items()}

    def spec(x: Array) -> pl.BlockSpec:
        heads = x.shape[1]
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda part, h, b: (b, h if heads > 1 else 0, *(0,) * (x.ndim - 2)))

    names = *given, "out", "lse"
    body = lambda *refs: _program(plan, SimpleNamespace(**dict(zip(names, refs, strict=True))), bk, -(-tiles // parts), D)
    moved = sum(x.size * x.dtype.itemsize for x in given.values())
    out, lse = pl.pallas_call(
        body,
        grid=(parts, K, B),
        in_specs=[spec(x) for x in given.values()],
        out_specs=[
            pl.BlockSpec((None, None, None, R, E), lambda part, h, b: (b, part, h, 0, 0)),
            pl.BlockSpec((None, None, None, R), lambda part, h, b: (b, part, h, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, parts, K, R, E), jnp.float32),
            jax.ShapeDtypeStruct((B, parts, K, R), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        cost_estimate=pl.CostEstimate(flops=4 * B * H * T * S * E, transcendentals=B * H * T * S, bytes_accessed=moved),
        interpret=interpret,
    )(*given.values())
    back = lambda x: x[:, :, : H // K * T].reshape(B, K, H // K, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)
    out, lse = _merged(out, lse)
    return back(out), back(lse[..., None])[..., 0]


def _queries(q, q_tokens, slopes, K, partner) -> dict[str, Array]:
    """[B, K or 1, ...] by name: queries in R rows of a key head, and their partners where keys are turned."""
    B, T, H, _ = q.shape
    R = max(SMALLEST, 1 << (H // K * T - 1).bit_length())
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, R - x.shape[2])] + [(0, 0)] * (x.ndim - 3))
    stacked = lambda x: pad(x.reshape(B, T, K, H // K, -1).transpose(0, 2, 3, 1, 4).reshape(B, K, H // K * T, -1))
    tokens = pad(jnp.stack([jnp.tile(x, (1, H // K)) for x in q_tokens], axis=1))[:, None]
    given = {"q": stacked(q), "q_tokens": tokens}
    if partner is not None:
        given["partner"] = stacked(partner)
    return given if slopes is None else given | {"slopes": stacked(slopes)[..., 0]}


def _held(plan: Plan, slots: Slots, D: int) -> dict[str, tuple[Array, bool]]:
    """[B, K or 1, n, ...] by name, and whether slots lie along n."""
    B = slots.used.shape[0]
    given = {name: (x, True) for name, x in zip(Tokens._fields, slots.tokens, strict=True)}
    given["used"] = (jnp.minimum(slots.used, slots.tokens.index.shape[2]).astype(jnp.int32)[:, None, None], False)
    if slots.extra is not None:
        given["extra"] = (slots.extra, True)
    if slots.turning is not None:
        given["position"] = (slots.turning.positions.astype(jnp.float32).reshape(B, -1, slots.tokens.index.shape[2]), True)
        given["lanes"] = (jnp.broadcast_to(slots.turning.lanes(D, plan.pairing), (B, 1, 4, D)), False)
    elif slots.pairs:
        for name, x, rest in (("cosine", slots.cosine, 1.0), ("sine", slots.sine, 0.0)):
            x = x.reshape(B, -1, *x.shape[1:])
            given[name] = (x if 2 * x.shape[-1] == D else widened(x, D, plan.pairing, rest), True)
    for side, form, arrays in (("k", plan.keys, slots.k), ("v", plan.values, slots.v)):
        given |= {f"{side}_{name}": found for name, found in operands(form, arrays).items()}
    return given


def _program(plan: Plan, refs: SimpleNamespace, bk: int, each: int, D: int) -> None:
    """One part of the slots of one key head."""
    q, part, used, turned = refs.q[...], pl.program_id(0), refs.used[0], hasattr(refs, "partner")
    partner = refs.partner[...] if turned else None
    q_tokens = Tokens(*(refs.q_tokens[n, :][:, None] for n in range(4)))
    slopes = refs.slopes[...][:, None] if hasattr(refs, "slopes") else None
    key_refs, value_refs = _side(refs, "k"), _side(refs, "v")
    R, E = refs.out.shape

    def step(i, carry):
        total_out, top, total = carry
        start = i * bk
        here = pl.ds(start, bk)
        k_tokens = Tokens(*(getattr(refs, name)[here][None, :] for name in Tokens._fields))
        place = start + jnp.arange(bk, dtype=jnp.int32)
        there = (refs.segments[here] != 0) & (place < used)
        k = numbers(plan.keys, key_refs, start, bk, D)
        if turned:
            cosine, sine = _turned(refs, start, bk, D, plan.pairing)
            raw = dot(q, (k * cosine).astype(q.dtype), 1, 1) + dot(partner, (k * sine).astype(q.dtype), 1, 1)
        else:
            raw = dot(q, k.astype(q.dtype), 1, 1)
        s, _ = Scores(plan.mask, plan.scale, plan.softcap).logits(raw)
        if slopes is not None:
            s -= slopes * LOG2E * distance(q_tokens, k_tokens, plan.along).astype(jnp.float32)
        if hasattr(refs, "extra"):
            s += refs.extra[here][None, :] * LOG2E
        s = jnp.where(plan.mask.visible(q_tokens, k_tokens) & there[None, :], s, LOW)
        peak = jnp.maximum(top, s.max(axis=1))
        p = jnp.exp2(s - peak[:, None])
        decay = jnp.exp2(top - peak)
        v = jnp.where(there[:, None], numbers(plan.values, value_refs, start, bk, E), 0.0)
        total_out = total_out * decay[:, None] + dot(p.astype(q.dtype), v.astype(q.dtype), 1, 0)
        return total_out, peak, total * decay + p.sum(axis=1)

    last = jnp.minimum((part + 1) * each, jax.lax.div(used + (bk - 1), jnp.int32(bk)))
    begin = jnp.zeros((R, E), jnp.float32), jnp.full((R,), LOW, jnp.float32), jnp.zeros((R,), jnp.float32)
    total_out, top, total = jax.lax.fori_loop(part * each, last, step, begin)
    blind = sees_nothing(top, total)
    total = jnp.where(blind, 1.0, total)
    refs.out[...] = jnp.where(blind[:, None], 0.0, total_out / total[:, None])
    refs.lse[...] = jnp.where(blind, -jnp.inf, (top + jnp.log2(total)) / LOG2E)


def _turned(refs: SimpleNamespace, start, bk: int, D: int, pairing: Pairing) -> tuple[Array, Array]:
    """Cosine and sine of some slots, a channel each."""
    if not hasattr(refs, "position"):
        return tuple(table(ref, start, bk, D, pairing) for ref in (refs.cosine, refs.sine))
    lane = lambda n: refs.lanes[n, :][None, :]
    turn = angles.turns(refs.position[pl.ds(start, bk)][:, None], lane(0), lane(1), lane(2))
    return angles.sine(turn + 0.25) * lane(3), angles.sine(turn) * lane(3)


NAMES = ("codes", "plane0", "plane1", "scale", "zero", "codebook", "by_channel")


def _side(refs: SimpleNamespace, side: str) -> SimpleNamespace:
    own = [ref for name, ref in vars(refs).items() if name.startswith(f"{side}_own")]
    return SimpleNamespace(own=own, **{name: getattr(refs, f"{side}_{name}", None) for name in NAMES})


def _filled(x: Array, S: int, bk: int) -> Array:
    """With room for whole tiles."""
    missing = -S % bk * x.shape[2] // S
    return jnp.pad(x, [(0, missing if axis == 2 else 0) for axis in range(x.ndim)]) if missing else x


def _merged(out: Float[Array, "B parts K R E"], lse: Float[Array, "B parts K R"]) -> tuple[Array, Array]:
    top = lse.max(axis=1, keepdims=True)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0, top))
    total = weights.sum(axis=1)
    out = (out * weights[..., None]).sum(axis=1) / jnp.where(total == 0, 1, total)[..., None]
    return out, top[:, 0] + jnp.log(total)
