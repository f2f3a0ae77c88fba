"""The three kernels of tile attention for Hopper GPUs: forward, gradient of the queries, gradients of keys and values.

FlashAttention-3 (2024). Two warpgroups compute, each on half of the tile of outputs that a program keeps; a third one copies
the tiles of its list into shared memory, `stages` ahead. While one computes its softmax, the other has the tensor cores. The
formulas are those of `triton_kernels`. Arrays are whole, in global memory; a program is a tile, a head and a row of the batch:
    q, d_out, out, dq [B, T, H, width]   k, v, dk, dv [B, S, K, width]   q_tokens [B, 4, T], k_tokens
    lse, delta [B, H, T]; lse that comes in is in base 2   minors [B, groups, A], ends [B, groups, majors, 3]: `gpu_lists`
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from pallas_kernels.tile_attention.scores import LOG2E, LOW, Scores, sees_nothing
from pallas_kernels.tile_attention.tokens import Tokens

GROUPS = 2  # warpgroups that compute
ROWS = 64  # of one of them: what a matrix instruction takes
TILE, ROW, COLUMN = mosaic.Layout.WGMMA, mosaic.Layout.WGMMA.reduce(1), mosaic.Layout.WGMMA.reduce(0)
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40  # of a thread


class Work(NamedTuple):
    """Of one kernel. minor: tokens of the tiles that pass by; stages: tiles of them in shared memory; wanted: of dk and dv."""

    scores: Scores
    minor: int
    stages: int
    wanted: tuple[str, ...] = ("dv", "dk")


def forward(work: Work, minors, ends, q, q_tokens, k, v, k_tokens, out, lse) -> None:
    D, E, bk, stages = q.shape[3], v.shape[3], work.minor, work.stages
    tile, head, b = _program(last_first=ends.shape[2])
    minor, full, some = _listed(minors, ends, b, head, q.shape[2], tile)

    def kernel(q_smem, q_ready, turn, keys):
        k_smem, v_smem, tokens_smem, k_ready, v_ready, k_done, v_done = keys
        group = jax.lax.axis_index("group")

        def take_turns():
            mosaic.barrier_arrive(turn)
            mosaic.barrier_wait(turn)

        @pl.when(group < GROUPS)
        def _compute():
            mosaic.set_max_registers(COMPUTE_REGISTERS, action="increase")
            rows = _rows(tile, group)
            mosaic.copy_gmem_to_smem(q.at[b, rows, head], q_smem.at[group], q_ready.at[group])
            mosaic.barrier_wait(q_ready.at[group])
            seen_from = _tokens(q_tokens.at[b, :, rows], ROW)

            def step(masked, n, carry):
                total_out, top, total = carry
                slot = _slot(n, stages)

                def product(s):
                    mosaic.wgmma(s, q_smem.at[group], k_smem.at[slot].transpose((1, 0)))
                    take_turns()
                    return s[...]

                s = pl.run_scoped(product, mosaic.ACC((ROWS, bk), jnp.float32))
                seen = _visible(work, seen_from, _tokens(tokens_smem.at[slot], COLUMN), s.shape) if masked else None
                mosaic.barrier_arrive(k_done.at[slot])
                peak, p = _softmax(work.scores, s, seen, top)
                decay = jnp.exp2(top - peak)
                total_out, total = total_out * _wide(decay, total_out.shape, 0), total * decay + p.sum(axis=1)
                total_out, total, peak, p = jax.lax.optimization_barrier((total_out, total, peak, p.astype(v.dtype)))
                mosaic.barrier_arrive(turn)
                mosaic.barrier_wait(v_ready.at[slot])
                mosaic.barrier_wait(turn)

                def add(total_out):
                    mosaic.wgmma(total_out, p, v_smem.at[slot])
                    pl.when(n + 1 < some)(lambda: mosaic.barrier_wait(k_ready.at[_slot(n + 1, stages)]))

                total_out = pl.run_state(add)(mosaic.ACC.init(total_out))
                mosaic.barrier_arrive(v_done.at[slot])
                return total_out, peak, total

            pl.when(some > 0)(lambda: mosaic.barrier_wait(k_ready.at[0]))
            pl.when(group == 1)(take_turns)
            start = _filled((ROWS, E), 0.0, TILE), _filled((ROWS,), LOW, ROW), _filled((ROWS,), 0.0, ROW)
            total_out, top, total = _over_list(full, some, step, start)
            pl.when(group == 0)(take_turns)
            blind = sees_nothing(top, total)
            total = jnp.where(blind, 1.0, total)
            out[b, rows, head] = total_out * _wide(jnp.where(blind, 0.0, 1 / total), total_out.shape, 0)
            lse[b, head, rows] = jnp.where(blind, -jnp.inf, (top + jnp.log2(total)) / LOG2E)

        pl.when(group == GROUPS)(_copies_of_keys(work, minor, some, b, head, q.shape[2], k, v, k_tokens, *keys))

    pl.run_scoped(
        kernel,
        _matrices((GROUPS, ROWS, D), q.dtype),
        mosaic.Barrier(num_barriers=GROUPS),
        mosaic.Barrier(num_arrivals=GROUPS),
        _slots_of_keys(work, D, E, q.dtype),
        collective_axes="group",
    )


def query_gradient(work: Work, minors, ends, q, d_out, lse, delta, q_tokens, k, v, k_tokens, dq) -> None:
    D, E, bk, stages = q.shape[3], v.shape[3], work.minor, work.stages
    tile, head, b = _program(last_first=ends.shape[2])
    minor, full, some = _listed(minors, ends, b, head, q.shape[2], tile)

    def kernel(q_smem, d_smem, given, keys):
        k_smem, v_smem, tokens_smem, k_ready, v_ready, k_done, v_done = keys
        group = jax.lax.axis_index("group")

        @pl.when(group < GROUPS)
        def _compute():
            mosaic.set_max_registers(COMPUTE_REGISTERS, action="increase")
            rows = _rows(tile, group)
            mosaic.copy_gmem_to_smem(q.at[b, rows, head], q_smem.at[group], given.at[group])
            mosaic.copy_gmem_to_smem(d_out.at[b, rows, head], d_smem.at[group], given.at[group])
            row_lse, row_delta = (_vector(x.at[b, head, rows], ROW) for x in (lse, delta))
            seen_from = _tokens(q_tokens.at[b, :, rows], ROW)
            mosaic.barrier_wait(given.at[group])

            def step(masked, n, total):
                slot = _slot(n, stages)
                mosaic.barrier_wait(k_ready.at[slot])
                mosaic.barrier_wait(v_ready.at[slot])

                def products(s, dp):
                    mosaic.wgmma(s, q_smem.at[group], k_smem.at[slot].transpose((1, 0)))
                    mosaic.wgmma(dp, d_smem.at[group], v_smem.at[slot].transpose((1, 0)))
                    return s[...], dp[...]

                s, dp = pl.run_scoped(products, *(mosaic.ACC((ROWS, bk), jnp.float32),) * 2)
                mosaic.barrier_arrive(v_done.at[slot])
                seen = _visible(work, seen_from, _tokens(tokens_smem.at[slot], COLUMN), s.shape) if masked else None
                _, ds = _gradient(work.scores, s, seen, _wide(row_lse, s.shape, 0), dp, _wide(row_delta, s.shape, 0))
                ds = ds.astype(k.dtype)
                total = pl.run_state(lambda total: mosaic.wgmma(total, ds, k_smem.at[slot]))(mosaic.ACC.init(total))
                mosaic.barrier_arrive(k_done.at[slot])
                return total

            dq[b, rows, head] = _over_list(full, some, step, _filled((ROWS, D), 0.0, TILE)) * work.scores.scale

        pl.when(group == GROUPS)(_copies_of_keys(work, minor, some, b, head, q.shape[2], k, v, k_tokens, *keys))

    pl.run_scoped(
        kernel,
        _matrices((GROUPS, ROWS, D), q.dtype),
        _matrices((GROUPS, ROWS, E), q.dtype),
        mosaic.Barrier(num_arrivals=2, num_barriers=GROUPS),
        _slots_of_keys(work, D, E, q.dtype),
        collective_axes="group",
    )


def key_gradient(work: Work, minors, ends, q, d_out, lse, delta, q_tokens, k, v, k_tokens, *outs) -> None:
    """Scores keys first. Query heads pass by one at a time, all those of the key head. outs: as `work.wanted` says."""
    D, E, bq, stages, heads = q.shape[3], v.shape[3], work.minor, work.stages, q.shape[2] // k.shape[2]
    widths, of_keys = {"dk": D, "dv": E}, "dk" in work.wanted
    tile, key_head, b = _program()
    minor, full, some = _listed(minors, ends, b, key_head, k.shape[2], tile)
    full, some = full * heads, some * heads

    def kernel(k_smem, v_smem, given, queries):
        q_smem, d_smem, lse_smem, delta_smem, tokens_smem, ready, done = queries
        group = jax.lax.axis_index("group")

        @pl.when(group < GROUPS)
        def _compute():
            mosaic.set_max_registers(COMPUTE_REGISTERS, action="increase")
            rows = _rows(tile, group)
            mosaic.copy_gmem_to_smem(k.at[b, rows, key_head], k_smem.at[group], given.at[group])
            mosaic.copy_gmem_to_smem(v.at[b, rows, key_head], v_smem.at[group], given.at[group])
            seen = _tokens(k_tokens.at[b, :, rows], ROW)
            mosaic.barrier_wait(given.at[group])

            def step(masked, n, carry):
                slot = _slot(n, stages)
                mosaic.barrier_wait(ready.at[slot])

                def products(s, dp=None):
                    mosaic.wgmma(s, k_smem.at[group], q_smem.at[slot].transpose((1, 0)))
                    if dp is None:
                        return s[...], None
                    mosaic.wgmma(dp, v_smem.at[group], d_smem.at[slot].transpose((1, 0)))
                    return s[...], dp[...]

                s, dp = pl.run_scoped(products, *(mosaic.ACC((ROWS, bq), jnp.float32),) * (1 + of_keys))
                seen_from = _tokens(tokens_smem.at[slot], COLUMN) if masked else None
                visible = _visible(work, seen_from, seen, s.shape, q_axis=1) if masked else None
                column = lambda x: _wide(_vector(x.at[slot], COLUMN), s.shape, 1)
                p, ds = _gradient(work.scores, s, visible, column(lse_smem), dp, column(delta_smem))
                factors = {"dv": (p.astype(d_out.dtype), d_smem)}
                if of_keys:
                    factors["dk"] = ds.astype(q.dtype), q_smem

                def add(totals):
                    for name, total in zip(work.wanted, totals, strict=True):
                        mosaic.wgmma(total, factors[name][0], factors[name][1].at[slot])

                carry = pl.run_state(add)(tuple(map(mosaic.ACC.init, carry)))
                mosaic.barrier_arrive(done.at[slot])
                return tuple(carry)

            totals = _over_list(full, some, step, tuple(_filled((ROWS, widths[name]), 0.0, TILE) for name in work.wanted))
            for name, out, total in zip(work.wanted, outs, totals, strict=True):
                out[b, rows, key_head] = total * work.scores.scale if name == "dk" else total

        pl.when(group == GROUPS)(
            _copies_of_queries(work, minor, some, b, key_head, heads, (q, d_out, lse, delta, q_tokens), *queries)
        )

    pl.run_scoped(
        kernel,
        _matrices((GROUPS, ROWS, D), q.dtype),
        _matrices((GROUPS, ROWS, E), q.dtype),
        mosaic.Barrier(num_arrivals=2, num_barriers=GROUPS),
        _slots_of_queries(work, D, E, q.dtype),
        collective_axes="group",
    )


def _program(last_first: int | None = None) -> tuple[Any, Any, Any]:
    """(tile, head, row of the batch); with a number of tiles the last, which see most under a causal mask, start first."""
    tile = jax.lax.axis_index("tile")
    return tile if last_first is None else last_first - 1 - tile, jax.lax.axis_index("head"), jax.lax.axis_index("row")


def _rows(tile, group):
    """Tokens of the outputs of a warpgroup."""
    return pl.ds(tile * (GROUPS * ROWS) + group * ROWS, ROWS)


def _listed(minors, ends, b, head, heads: int, tile) -> tuple[Callable[[Any], Any], Any, Any]:
    """The n-th tile of a row as a function, and how many of them are full and are listed."""
    group = jax.lax.div(head, jnp.int32(heads // ends.shape[1]))
    start, full, some = (ends[b, group, tile, i] for i in range(3))
    return lambda n: minors[b, group, start + n], full, some


def _over_list(full, some, step: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
    """`carry = step(masked, n, carry)` along the list, full tiles without a mask."""
    carry = jax.lax.fori_loop(0, full, functools.partial(step, False), carry)
    return jax.lax.fori_loop(full, some, functools.partial(step, True), carry)


def _slots_of_keys(work: Work, D: int, E: int, dtype) -> tuple:
    """Shared memory and barriers of the tiles of keys that pass by."""
    stages, bk = work.stages, work.minor
    done = mosaic.Barrier(num_arrivals=GROUPS, num_barriers=stages)
    return (
        _matrices((stages, bk, D), dtype),
        _matrices((stages, bk, E), dtype),
        mosaic.SMEM((stages, 4, bk), jnp.int32),
        mosaic.Barrier(num_arrivals=2, num_barriers=stages),
        mosaic.Barrier(num_barriers=stages),
        done,
        done,
    )


def _copies_of_keys(work: Work, minor, some, b, head, heads: int, k, v, k_tokens, *slots) -> Callable[[], None]:
    """What the third warpgroup does where keys pass by."""
    k_smem, v_smem, tokens_smem, k_ready, v_ready, k_done, v_done = slots

    def run():
        mosaic.set_max_registers(COPY_REGISTERS, action="decrease")
        key_head = jax.lax.div(head, jnp.int32(heads // k.shape[2]))

        def copy(n, wait):
            slot, keys = _slot(n, work.stages), pl.ds(minor(n) * work.minor, work.minor)
            if wait:
                mosaic.barrier_wait(k_done.at[slot])
            mosaic.copy_gmem_to_smem(k.at[b, keys, key_head], k_smem.at[slot], k_ready.at[slot])
            mosaic.copy_gmem_to_smem(k_tokens.at[b, :, keys], tokens_smem.at[slot], k_ready.at[slot])
            if wait:
                mosaic.barrier_wait(v_done.at[slot])
            mosaic.copy_gmem_to_smem(v.at[b, keys, key_head], v_smem.at[slot], v_ready.at[slot])

        _ahead(work.stages, some, copy)

    return run


def _slots_of_queries(work: Work, D: int, E: int, dtype) -> tuple:
    """Shared memory and barriers of the tiles of queries that pass by."""
    stages, bq = work.stages, work.minor
    return (
        _matrices((stages, bq, D), dtype),
        _matrices((stages, bq, E), dtype),
        mosaic.SMEM((stages, bq), jnp.float32),
        mosaic.SMEM((stages, bq), jnp.float32),
        mosaic.SMEM((stages, 4, bq), jnp.int32),
        mosaic.Barrier(num_arrivals=5, num_barriers=stages),
        mosaic.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    )


def _copies_of_queries(work: Work, minor, some, b, key_head, heads: int, arrays, *slots) -> Callable[[], None]:
    """What the third warpgroup does where queries pass by, the heads of a key head after each other."""
    q, d_out, lse, delta, q_tokens = arrays
    *memory, ready, done = slots

    def run():
        mosaic.set_max_registers(COPY_REGISTERS, action="decrease")

        def copy(n, wait):
            slot, head = _slot(n, work.stages), key_head * heads + jax.lax.rem(n, jnp.int32(heads))
            queries = pl.ds(minor(jax.lax.div(n, jnp.int32(heads))) * work.minor, work.minor)
            if wait:
                mosaic.barrier_wait(done.at[slot])
            rows = q.at[b, queries, head], d_out.at[b, queries, head], lse.at[b, head, queries], delta.at[b, head, queries]
            for source, target in zip((*rows, q_tokens.at[b, :, queries]), memory, strict=True):
                mosaic.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

        _ahead(work.stages, some, copy)

    return run


def _ahead(stages: int, some, copy: Callable[[Any, bool], None]) -> None:
    """`copy(n, wait)` for the n-th tile of a list; all but the first wait until their slot is free."""
    for n in range(stages):
        pl.when(n < some)(functools.partial(copy, jnp.int32(n), False))

    @pl.loop(stages, jnp.maximum(some, stages))
    def _(n):
        copy(n, True)


def _slot(n, stages: int):
    return jax.lax.rem(n, jnp.int32(stages))


def _matrices(shape: tuple[int, ...], dtype):
    """Shared memory as matrix instructions read it."""
    return mosaic.SMEM(shape, dtype, transforms=(mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128)))


def _filled(shape: tuple[int, ...], value: float, layout):
    return mosaic.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _vector(ref, layout):
    return mosaic.load(ref, (), layout=layout, optimized=False)


def _tokens(ref, layout) -> Tokens:
    return Tokens(*(_vector(ref.at[field], layout) for field in range(4)))


def _wide(x, shape: tuple[int, ...], axis: int):
    """A vector along an axis of a tile."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def _visible(work: Work, q: Tokens, k: Tokens, shape: tuple[int, ...], q_axis: int = 0):
    q, k = (Tokens(*(_wide(x, shape, axis) for x in side)) for side, axis in ((q, q_axis), (k, 1 - q_axis)))
    return work.scores.mask.visible(q, k)


def _softmax(scores: Scores, s, seen, top):
    """(the largest score of each row so far, exponentials) of products; `seen` is None where every pair is."""
    if seen is None and scores.softcap is None:  # a product and a difference, in one instruction
        scale = scores.scale * LOG2E
        peak = jnp.maximum(top, s.max(axis=1) * scale)
        return peak, jnp.exp2(s * scale - _wide(peak, s.shape, 0))
    s, _ = scores.logits(s, _tanh)
    s = s if seen is None else jnp.where(seen, s, LOW)
    peak = jnp.maximum(top, s.max(axis=1))
    return peak, jnp.exp2(s - _wide(peak, s.shape, 0))


def _gradient(scores: Scores, s, seen, lse, dp, delta):
    """(weights, gradient of the scores) of products, their lse in base 2, and the products of d_out and v if that is wanted."""
    s, slope = scores.logits(s, _tanh)
    s = s if seen is None else jnp.where(seen, s, LOW)
    p = jnp.exp2(s - lse)
    return p, None if dp is None else p * (dp - delta) * slope


def _tanh(x):
    """To 1e-7: the chip's own is within 5e-4 of the value."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))
