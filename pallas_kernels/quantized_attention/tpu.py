"""Attention to coded slots for TPUs (Pallas, Mosaic): a grid of rows and tiles of slots, all key heads of a tile in one step.

Codes come to vector memory as they are held and are unpacked there (`tpu_formats`), so what is read follows their bits; tokens
of all heads are read once. FlashAttention-2 (2023), scores in base 2; rows are the R queries of a key head, its G heads one
after the other, padded. Tiles behind the last used slot are neither copied nor computed.
"""

import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.quantized_attention import tpu_turns
from pallas_kernels.quantized_attention.formats import Plan, Slots, TokenGroups, channels
from pallas_kernels.quantized_attention.packing import BLOCK
from pallas_kernels.quantized_attention.reference import partners
from pallas_kernels.quantized_attention.tpu_formats import (
    Operand,
    by_token,
    groups,
    key_scores,
    operands,
    prepare,
    scratch,
    value_sums,
)
from pallas_kernels.tile_attention.scores import LOG2E, LOW, Scores, sees_nothing
from pallas_kernels.tile_attention.tokens import Tokens, distance
from pallas_kernels.tpu_chips import LANES, MIB, kernel_room, padded_bytes, this_chip

ROWS = 256  # of queries of a key head, at most
GROUPS = 16  # of channels
OUTLIERS = 32
TILES = (2048, 1024, 512, 256)  # slots
OWN = 6 * MIB  # for the compiler
NUMBERS = 10  # arrays of a tile's numbers in float32, at most


def refused(plan: Plan, q: Float[Array, "B T H D"], slots: Slots, tile: int | None = None) -> str | None:
    """Why the kernel does not take a call, if it does not; a given tile is not asked whether it fits."""
    D, E, rows = channels(slots.k), channels(slots.v), q.shape[1] * q.shape[2] // jax.tree.leaves(slots.k)[0].shape[1]
    if D % LANES or E % LANES:
        return f"heads of {D} and {E} channels: the TPU kernel takes multiples of {LANES}"
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not 0 < rows <= ROWS:
        return f"{rows} queries of a key head in {q.dtype}: the TPU kernel takes 1 to {ROWS}, in bfloat16 or float32"
    if isinstance(plan.keys, TokenGroups) and plan.keys.size % BLOCK:
        return f"groups of {plan.keys.size} tokens: the TPU kernel takes multiples of {BLOCK}"
    for form, arrays in ((plan.keys, slots.k), (plan.values, slots.v)):
        if groups(form, channels(arrays)) > GROUPS:
            return f"{form}: the TPU kernel takes at most {GROUPS} groups of channels"
        if hasattr(arrays, "place") and len(arrays.place) > OUTLIERS:
            return f"{len(arrays.place)} outliers a token: the TPU kernel takes at most {OUTLIERS}"
    if tile is None and not _tiles(plan, q, slots):
        return f"{q.shape} queries beside {slots.tokens.index.shape[2]} slots do not fit the vector memory"
    return None


def forward(
    plan: Plan,
    q: Float[Array, "B T H D"],
    slots: Slots,
    q_tokens: Tokens,
    slopes: Float[Array, "B T H"] | None = None,
    *,
    tile: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32. tile: slots of one, by default the most that fit."""
    if (reason := refused(plan, q, slots, tile)) is not None:
        raise ValueError(reason)
    (B, T, H, _), S, E = q.shape, slots.tokens.index.shape[2], channels(slots.v)
    bk = tile or _tiles(plan, q, slots)[0]
    given = _given(plan, q, slots, q_tokens, slopes)
    K, R = given["q"].array.shape[1], given["q_tokens"].array.shape[2]
    held = {name: Operand(_at_least(x, S, bk), x.axis) for name, x in given.items()}
    if not interpret:  # XLA would copy whole arrays of slots to vector memory where they fit, used or not
        in_place = lambda x: x if x.axis is None else x._replace(array=pltpu.with_memory_space_constraint(x.array, pltpu.HBM))
        held = {name: in_place(x) for name, x in held.items()}
    used = jnp.clip(slots.used.astype(jnp.int32), 0, S)
    last = jnp.maximum(-(-used // bk) - 1, 0)
    tiles = -(-S // bk)
    needed = _scratch(plan, slots, K, R, bk)

    def spec(x: Operand) -> pl.BlockSpec:
        shape = _block(x, max(S, bk), bk)
        place = lambda b, i, used, last, first: (
            b if len(x.array) == B else first[0] + b,
            *(jnp.minimum(i, last[b]) if axis == x.axis else 0 for axis in range(1, len(shape))),
        )
        return pl.BlockSpec((None, *shape[1:]), place)

    outputs = {"out": (B, K, R, E), "lse": (B, K, R, LANES)}
    names = *held, *outputs, *needed

    def body(used, last, first, *refs):
        named = SimpleNamespace(**dict(zip(names, refs, strict=True)))
        _step(plan, named, used, last, bk, tiles)

    rows = lambda x: x.array.size // len(x.array) * B * x.array.dtype.itemsize
    moved = sum(map(rows, given.values())) + 4 * sum(map(math.prod, outputs.values()))
    out, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, tiles),
            in_specs=[spec(x) for x in held.values()],
            out_specs=[pl.BlockSpec((None, *shape[1:]), lambda b, i, *_: (b, 0, 0, 0)) for shape in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.int32 if "words" in name else jnp.float32) for name, shape in needed.items()],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_bytes(given, needed, S, bk) + OWN
        ),
        cost_estimate=pl.CostEstimate(flops=4 * B * H * T * S * E, transcendentals=B * H * T * S, bytes_accessed=moved),
        interpret=interpret,
    )(used, last, jnp.asarray(slots.first, jnp.int32)[None], *(x.array for x in held.values()))
    back = lambda x: x[:, :, : H // K * T].reshape(B, K, H // K, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)
    return back(out), back(lse)[..., 0]


def _given(plan, q, slots, q_tokens, slopes) -> dict[str, Operand]:
    """All operands by name, [B, ...]: queries in rows of a key head, tokens and slopes of rows in every lane."""
    (B, T, H, D), K = q.shape, jax.tree.leaves(slots.k)[0].shape[1]
    multiple = 8 if q.dtype == jnp.float32 else 16
    R = -(-(H // K * T) // multiple) * multiple
    pad = lambda x, axis: jnp.pad(x, [(0, R - x.shape[n] if n == axis else 0) for n in range(x.ndim)])
    stacked = lambda x: pad(x.reshape(B, T, K, H // K, -1).transpose(0, 2, 3, 1, 4).reshape(B, K, H // K * T, -1), 2)
    if slots.pairs:
        rows = [stacked(q), stacked(partners(q, slots.pairs, plan.pairing))]
    else:
        count = groups(plan.keys, D) if by_token(plan.keys) else 1
        rows = [stacked(jnp.where(jnp.arange(D) // (D // count) == n, q, 0)) for n in range(count)]
    tokens = pad(jnp.stack([jnp.tile(x, (1, H // K)) for x in q_tokens], axis=1), 2)
    wide = lambda x: jnp.broadcast_to(x[..., None], (*x.shape, LANES))
    given = {"q": Operand(jnp.concatenate(rows, axis=2)), "q_tokens": Operand(wide(tokens))}
    if slopes is not None:
        given["slopes"] = Operand(wide(stacked(slopes)[..., 0]))
    given |= {name: Operand(x, 2) for name, x in zip(Tokens._fields, slots.tokens, strict=True)}
    if slots.extra is not None:
        given["extra"] = Operand(slots.extra, 2)
    given |= tpu_turns.operands(plan, slots)
    for side, form, arrays in (("k", plan.keys, slots.k), ("v", plan.values, slots.v)):
        given |= {f"{side}_{name}": x for name, x in operands(form, arrays).items()}
    return given


def _step(plan: Plan, refs: SimpleNamespace, used, last, bk: int, tiles: int) -> None:
    b, i = pl.program_id(0), pl.program_id(1)
    K, R = refs.top.shape[:2]
    shared = refs.index.shape[0] == 1

    @pl.when(i == 0)
    def start():
        refs.top[...] = jnp.full_like(refs.top, LOW)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.total_out[...] = jnp.zeros_like(refs.total_out)

    @pl.when(i <= last[b])
    def tile():
        slot = i * bk + jax.lax.broadcasted_iota(jnp.int32, (1, bk), 1)
        q_tokens = Tokens(*(refs.q_tokens[n][:, :1] for n in range(4)))

        def found(h):
            """Tokens of the slots, whether there are any, and whether queries see them."""
            k_tokens = Tokens(*(getattr(refs, name)[pl.ds(h, 1), :] for name in Tokens._fields))
            there = (k_tokens.segments != 0) & (slot < used[b])
            seen = plan.mask.visible(q_tokens, k_tokens) & there
            return k_tokens, there.astype(jnp.int32), seen.astype(jnp.int32)

        of_all = found(0) if shared else None
        keys, values = _side(refs, "k"), _side(refs, "v")
        prepare(plan.keys, keys)
        prepare(plan.values, values)
        turning = hasattr(refs, "position")
        if turning and refs.position.shape[0] == 1:
            tpu_turns.turning(refs, 0)

        def head(h, carry):
            k_tokens, there, seen = found(h) if of_all is None else of_all
            there = there != 0
            if turning and refs.position.shape[0] > 1:
                tpu_turns.turning(refs, h)
            raw = key_scores(plan.keys, keys, h, refs.q[h], R)
            s, _ = Scores(plan.mask, plan.scale, plan.softcap).logits(raw)
            if hasattr(refs, "slopes"):
                away = distance(q_tokens, k_tokens, plan.along).astype(jnp.float32)
                s -= refs.slopes[h][:, :1] * LOG2E * away
            if hasattr(refs, "extra"):
                s += refs.extra[pl.ds(h, 1), :] * LOG2E
            s = jnp.where(seen != 0, s, LOW)
            before = refs.top[h]
            peak = jnp.maximum(before, s.max(axis=1, keepdims=True))
            p = jnp.exp2(s - peak[:, :1])
            decay = jnp.exp2(before - peak)
            refs.top[h] = peak
            refs.total[h] = refs.total[h] * decay + p.sum(axis=1, keepdims=True)
            sums = value_sums(plan.values, values, h, p, there, refs.q.dtype)
            refs.total_out[h] = refs.total_out[h] * decay[:, :1] + sums
            return carry

        jax.lax.fori_loop(0, K, head, 0)

    @pl.when(i == tiles - 1)
    def finish():
        def head(h, carry):
            top, total = refs.top[h], refs.total[h]
            blind = sees_nothing(top, total)
            refs.out[h] = jnp.where(sees_nothing(top[:, :1], total[:, :1]), 0, refs.total_out[h] / total[:, :1])
            refs.lse[h] = jnp.where(blind, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
            return carry

        jax.lax.fori_loop(0, K, head, 0)


NAMES = ("codes", "plane0", "plane1", "scale", "zero", "codebook", "by_channel")
NAMES += ("own", "wide", "words0", "words1", "scales", "zeros", "rows")


def _side(refs: SimpleNamespace, side: str) -> SimpleNamespace:
    """References of keys or of values by the names of their operands and scratch, None where there is none."""
    found = {name: getattr(refs, f"{side}_{name}", None) for name in NAMES}
    found["owned"] = [ref for name, ref in vars(refs).items() if name.startswith(f"{side}_own") and name != f"{side}_own"]
    turned = side == "k" and (hasattr(refs, "turn") or hasattr(refs, "table"))
    return SimpleNamespace(**found, turn=functools.partial(tpu_turns.turn, refs) if turned else None)


def _tiles(plan: Plan, q, slots: Slots) -> list[int]:
    """Sizes of tiles that fit, the largest first: no longer than the slots, but for the smallest."""
    axes = {}

    def arrays(q, slots):
        tokens, slopes = Tokens(*(jnp.zeros(q.shape[:2], jnp.int32),) * 4), jnp.zeros(q.shape[:3])
        given = _given(plan, q, slots, tokens, slopes)
        axes.update({name: x.axis for name, x in given.items()})
        return {name: x.array for name, x in given.items()}

    given = {name: Operand(x, axes[name]) for name, x in jax.eval_shape(arrays, q, slots).items()}
    S, K, R = slots.tokens.index.shape[2], given["q"].array.shape[1], given["q_tokens"].array.shape[2]
    least = max(TILES[-1], 16 * plan.keys.size if isinstance(plan.keys, TokenGroups) else 0)  # 16 rows of half precision
    room = kernel_room(this_chip()) - OWN
    fits = lambda bk: _bytes(given, _scratch(plan, slots, K, R, bk), S, bk) <= room
    return [bk for bk in TILES if bk % least == 0 and bk <= max(S, least) and fits(bk)]


def _scratch(plan: Plan, slots: Slots, K: int, R: int, bk: int) -> dict[str, tuple[int, ...]]:
    """Shapes of arrays in vector memory, by name."""
    needed = {"top": (K, R, LANES), "total": (K, R, LANES), "total_out": (K, R, channels(slots.v))}
    if slots.turning is not None:
        needed["table"] = (bk, tpu_turns.width(plan, slots))
    for side, form, arrays, turned in (("k", plan.keys, slots.k, slots.pairs > 0), ("v", plan.values, slots.v, False)):
        needed |= {f"{side}_{name}": shape for name, shape in scratch(form, arrays, bk, turned).items()}
    return needed


def _block(x: Operand, S: int, bk: int) -> tuple[int, ...]:
    """Of a tile of slots."""
    return tuple(size * bk // S if axis == x.axis else size for axis, size in enumerate(x.array.shape))


def _bytes(given: dict[str, Operand], needed: dict[str, tuple[int, ...]], S: int, bk: int) -> int:
    """Of vector memory: tiles twice, one used while the next comes; sums; some arrays of scores and of numbers."""
    held = sum(2 * padded_bytes(_block(x, S, bk)[1:], x.array.dtype.itemsize) for x in given.values())
    rows, wide = given["q"].array.shape[2], max(given["q"].array.shape[-1], needed["total_out"][-1])
    return held + sum(map(padded_bytes, needed.values())) + 4 * bk * (4 * rows + NUMBERS * wide + 2 * LANES)


def _at_least(x: Operand, S: int, bk: int) -> Array:
    """With room for one tile."""
    if x.axis is None or bk <= S:
        return x.array
    missing = _block(x, S, bk)[x.axis] - x.array.shape[x.axis]
    return jnp.pad(x.array, [(0, missing if axis == x.axis else 0) for axis in range(x.array.ndim)])
