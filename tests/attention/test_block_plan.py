"""Attention over random block plans equals the dense reference that sees only what the plan lists, in value and gradient."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from infos import info, random_info

from lcx.attention.attend import attend
from lcx.attention.mask import Causal, Sink, Window, tokens_of
from lcx.attention.plan import BlockPlan, dense_plan, transpose
from lcx.attention.planned import Planned
from lcx.attention.ring import Ring
from lcx.attention.sharded import sharded_attend
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.alibi import ALiBi
from lcx.positions.flexrope import FlexRope
from pallas_kernels.tile_attention import op, reference, tile_list, tpu, triton
from pallas_kernels.tile_attention.tile_list import verified
from pallas_kernels.tile_attention.tiling import EMPTY, FULL, PARTIAL
from pallas_kernels.tile_attention.tokens import pad_tokens, tiles

B, T, S, H, K, D, E = 2, 45, 70, 4, 2, 8, 6
BLOCK = (16, 12)
NAMES = ("out", "lse", "dq", "dk", "dv")


def given(seed, kind="special"):
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, E), (B, T, H, E), (B, T, H)
    arrays = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return *arrays, random_info(rng, B, T, kind), random_info(rng, B, S, kind)


def random_plan(seed, groups, columns=0, block=BLOCK, rows=B, T=T, S=S, A=18) -> BlockPlan:
    """Half of the tiles, some twice, in any order of columns; a query tile of none; kinds at random; junk behind the counts."""
    rng = np.random.default_rng(seed)
    nq, nk = -(-T // block[0]), -(-S // block[1])
    shape = rows, groups
    lists = rng.integers(-1, 99, (2, *shape, A))
    kind = rng.choice([EMPTY, PARTIAL, FULL], (*shape, A), p=[0.1, 0.4, 0.5])
    count = rng.integers(A // 2, A + 1, shape)
    for place in np.ndindex(shape):
        n = count[place]
        lists[0][place][:n] = np.sort(rng.integers(1, nq, n))
        lists[1][place][:n] = rng.integers(0, nk, n)
    arrays = [jnp.asarray(x, jnp.int32) for x in (*lists, count)]
    plan = BlockPlan(
        rows=arrays[0],
        cols=arrays[1],
        count=arrays[2],
        kind=jnp.asarray(kind, jnp.int8),
        overflow=jnp.zeros(shape, jnp.int32),
        block=block,
        lengths=(T, S),
    )
    if columns == 0:
        return plan
    single = rng.integers(0, S, (*shape, nq, columns))
    counts = rng.integers(0, columns + 1, (*shape, nq))
    return dataclasses.replace(plan, columns=jnp.asarray(single, jnp.int32), column_count=jnp.asarray(counts, jnp.int32))


def pairs(plan: BlockPlan, T=T, S=S) -> np.ndarray:
    """The pairs that a plan lists, one entry at a time."""
    rows, cols, kind, count = map(np.asarray, plan.tiles)
    seen = np.zeros((*count.shape, T, S), bool)
    bq, bk = plan.block
    for b, g in np.ndindex(count.shape):
        for n in range(count[b, g]):
            if kind[b, g, n] != EMPTY:
                i, j = rows[b, g, n] * bq, cols[b, g, n] * bk
                seen[b, g, i : i + bq, j : j + bk] = True
        for i in range(0 if plan.columns is None else plan.columns.shape[2]):
            for n in range(int(plan.column_count[b, g, i])):
                seen[b, g, i * bq : (i + 1) * bq, int(plan.columns[b, g, i, n])] = True
    return seen


def with_gradient(form):
    def run(q, k, v, d_out, d_lse, *rest):
        (out, lse), pull = jax.vjp(lambda q, k, v: form(q, k, v, *rest), q, k, v)
        return out, lse, *pull((d_out, jnp.where(lse == -jnp.inf, 0, d_lse)))

    return jax.jit(run)


def dense(mask, softcap=None, bias=None):
    """By autodiff of the dense forward pass, over pairs listed by `pairs`."""

    def form(q, k, v, q_info, k_info, seen):
        options = {"mask": mask, "scale": 0.4, "softcap": softcap, "allowed": seen}
        options["bias"] = None if bias is None else bias.decay(q.shape[2]).bias(q)
        return reference.forward(q, k, v, tokens_of(q_info), tokens_of(k_info), **options)

    return with_gradient(form)


def planned(mask, softcap=None, backend="xla", bias=None):
    options = {"mask": mask, "scale": 0.4, "softcap": softcap, "bias": bias, "backend": backend}
    return with_gradient(lambda *a: attend(*a[:-1], plan=a[-1], **options))


def compare(got, expected, tolerance=2e-6):
    for name, value, other in zip(NAMES, got, expected, strict=True):
        largest = np.abs(other[np.isfinite(other)]).max(initial=0)
        np.testing.assert_allclose(value, other, rtol=0, atol=tolerance * largest, err_msg=name)


CASES = [("xla", K, 0), ("xla", K, 9), ("reference", H, 9), ("xla", 1, 0), ("xla", 1, 9), ("xla", H, 0), ("xla", H, 9)]


@pytest.mark.parametrize(
    "backend, groups, columns",
    [pytest.param(*case, marks=pytest.mark.slow if n else ()) for n, case in enumerate(CASES)],
)
def test_random_plans_equal_the_reference(backend, groups, columns, monkeypatch):
    """Columns of two of three blocks are gathered at a time. A dense plan, of the same shape, is one of the plans."""
    mask, softcap = Sink(size=3) | Window(size=20), 2.0 if groups == K else None
    monkeypatch.setattr("lcx.attention.planned.GATHERED", 2 * B * max(groups, K) * 9 * (D + E))
    run, expected = planned(mask, softcap, backend), dense(mask, softcap)
    hidden = 0
    for seed, kind in enumerate(("documents", "packed", "special", "mixed")):
        plan, inputs = random_plan(seed, groups, columns), given(seed, kind)
        got = run(*inputs, plan)
        compare(got, expected(*inputs, jnp.asarray(pairs(plan))))
        nothing = np.isneginf(got[1])
        assert not np.asarray(got[0])[nothing].any() and not np.asarray(got[2])[nothing].any()
        hidden += nothing.sum()
    assert hidden > 0
    every = jax.jit(functools.partial(dense_plan, mask, block=BLOCK))(*inputs[-2:])
    lists = {name: jnp.repeat(getattr(every, name), groups, axis=1) for name in ("rows", "cols", "kind", "count")}
    assert not every.overflow.any()
    compare(run(*inputs, dataclasses.replace(plan, **lists)), expected(*inputs, jnp.ones((B, groups, T, S), bool)))


@pytest.mark.parametrize(
    "bias, groups, backend",
    [
        pytest.param(ALiBi(), K, "xla", id="ALiBi, a key head", marks=pytest.mark.slow),
        pytest.param(FlexRope(slope=0.2), H, "xla", id="FlexRope, a query head", marks=pytest.mark.slow),
        pytest.param(ALiBi(), 1, "xla", id="ALiBi, one for all", marks=pytest.mark.slow),
        pytest.param(FlexRope(slope=0.2), K, "reference", id="FlexRope, reference"),
    ],
)
def test_columns_fall_with_distance_as_tiles_do(bias, groups, backend, monkeypatch):
    """Columns of two of three blocks are gathered at a time, with the slopes of their block's queries."""
    mask = Sink(size=3) | Window(size=20)
    monkeypatch.setattr("lcx.attention.planned.GATHERED", 2 * B * max(groups, K) * 9 * (D + E))
    run, expected = planned(mask, None, backend, bias), dense(mask, None, bias)
    for seed, kind in enumerate(("documents", "special", "mixed")):
        plan, inputs = random_plan(seed, groups, columns=9), given(seed, kind)
        compare(run(*inputs, plan), expected(*inputs, jnp.asarray(pairs(plan))))


@pytest.mark.parametrize(
    "groups, columns, entries",
    [
        pytest.param(H, 0, 12, marks=pytest.mark.slow),
        pytest.param(K, 9, 250_000, marks=pytest.mark.slow),
        pytest.param(1, 0, 3, marks=pytest.mark.slow),
    ],
    ids=["a query head, in ranges", "a key head, columns", "one for all, in ranges"],
)
def test_the_tpu_kernels(groups, columns, entries, monkeypatch):
    """Interpreted; in ranges: scalar memory for a list of one row of tiles."""
    interpreted = {name: functools.partial(getattr(tpu, name), interpret=True) for name in ("forward", "backward")}
    monkeypatch.setitem(op.FORMS, "tpu", types.SimpleNamespace(**interpreted))
    monkeypatch.setattr(tile_list, "ENTRIES", entries)
    rng, block, mask = np.random.default_rng(0), (128, 128), Window(size=200)
    shapes = (1, 201, H, 64), (1, 299, K, 64), (1, 299, K, 64), (1, 201, H, 64), (1, 201, H)
    arrays = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    plan = random_plan(1, groups, columns, block, rows=1, T=201, S=299, A=4)
    infos = random_info(rng, 1, 201, "documents"), random_info(rng, 1, 299, "special")
    fold = Planned("tpu", mask, 0.4, None, block)
    run = with_gradient(
        lambda q, k, v, q_info, k_info, plan: op.attention(fold, q, k, v, tokens_of(q_info), tokens_of(k_info), plan)
    )
    arrays = tuple(arrays)
    compare(run(*arrays, *infos, plan), dense(mask)(*arrays, *infos, jnp.asarray(pairs(plan, 201, 299))), 3e-6)


@pytest.mark.parametrize(
    "groups, columns, T",
    [
        pytest.param(H, 0, 61, marks=pytest.mark.slow),
        pytest.param(K, 9, 61, marks=pytest.mark.slow),
        pytest.param(H, 9, 5, marks=pytest.mark.slow),
    ],
    ids=["a query head", "a key head, columns", "few queries"],
)
def test_the_triton_kernels(groups, columns, T, monkeypatch):
    """Interpreted."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(triton, name, functools.partial(getattr(triton, name), interpret=True))
    rng, block, mask = np.random.default_rng(0), (32, 16), Window(size=50)
    shapes = (1, T, H, 64), (1, 99, K, 64), (1, 99, K, 64), (1, T, H, 64), (1, T, H)
    arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    plan = random_plan(1, groups, columns, block, rows=1, T=max(T, 33), S=99, A=8)
    if T < 33:
        plan = dataclasses.replace(
            plan,
            rows=plan.rows * 0,
            columns=plan.columns[:, :, :1],
            column_count=plan.column_count[..., :1],
            lengths=(T, 99),
        )
    infos = random_info(rng, 1, T, "documents"), random_info(rng, 1, 99, "special")
    fold = Planned("gpu", mask, 0.4, None, block)
    run = with_gradient(
        lambda q, k, v, q_info, k_info, plan: op.attention(fold, q, k, v, tokens_of(q_info), tokens_of(k_info), plan)
    )
    compare(run(*arrays, *infos, plan), dense(mask)(*arrays, *infos, jnp.asarray(pairs(plan, T, 99))), 3e-6)


def test_what_finds_no_place_is_reported():
    own = info(np.arange(64)[None], np.ones((1, 64)))
    plan = jax.jit(functools.partial(dense_plan, Causal(), block=(16, 16), most=7))(own, own)
    assert plan.count.tolist() == [[7]] and plan.overflow.tolist() == [[3]]
    assert plan.rows[0, 0].tolist() == [0, 1, 1, 2, 2, 2, 3] and plan.cols[0, 0].tolist() == [0, 0, 1, 0, 1, 2, 0]
    assert plan.kind[0, 0].tolist() == [PARTIAL, FULL, PARTIAL, FULL, FULL, PARTIAL, FULL]


def test_a_transposed_plan_lists_the_same_pairs_of_keys_by_queries():
    plan = random_plan(2, K)
    turned = transpose(plan)
    assert turned.block == BLOCK[::-1] and turned.lengths == (S, T)
    np.testing.assert_array_equal(pairs(turned, S, T), np.swapaxes(pairs(plan), -1, -2))
    for b, g in np.ndindex(B, K):
        assert (np.diff(np.asarray(turned.rows[b, g, : plan.count[b, g]])) >= 0).all()
    with pytest.raises(ValueError, match="expected tiles alone"):
        transpose(random_plan(2, K, columns=3))


def test_kinds_are_what_the_bounds_bear_out():
    """A promise that is wrong, a tile that is listed twice, one outside, one that is skipped, one that is fuller than said."""
    own = tokens_of(info(np.arange(64)[None], np.ones((1, 64))))
    entries = [(0, 0, FULL), (1, 0, PARTIAL), (1, 0, FULL), (0, 1, FULL), (2, 0, EMPTY), (2, 1, FULL), (4, 0, FULL), (3, 3, 1)]
    rows, cols, kind = (jnp.asarray(x, jnp.int32)[None, None] for x in zip(*entries, strict=True))
    plan = BlockPlan(
        rows=rows,
        cols=cols,
        kind=kind.astype(jnp.int8),
        count=jnp.asarray([[7]], jnp.int32),
        overflow=jnp.zeros((1, 1), jnp.int32),
        block=(16, 16),
        lengths=(64, 64),
    )
    side = jax.jit(lambda own: tiles(pad_tokens(own, 16), 16))(own)
    found = jax.jit(lambda given, side: verified(given, Causal(), side, side))(plan.tiles, side)
    n = int(found.count[0, 0])
    got = list(zip(*(np.asarray(x)[0, 0, :n].tolist() for x in found[:3]), strict=True))
    assert got == [(0, 0, PARTIAL), (0, 1, EMPTY), (1, 0, FULL), (1, 0, EMPTY), (2, 1, FULL)]


@pytest.mark.parametrize("T, S", [(0, 5), (5, 0)])
def test_nothing_to_attend(T, S):
    own = lambda n: info(np.arange(n)[None], np.ones((1, n)))
    zeros = lambda n, heads: jnp.zeros((1, n, heads, 4))
    plan = random_plan(0, 1, 2, rows=1, T=40, S=40)
    blocks = -(-T // 16)
    lists = {"columns": plan.columns[:, :, :blocks], "column_count": plan.column_count[:, :, :blocks]}
    plan = dataclasses.replace(plan, **lists, lengths=(T, S))
    run = jax.jit(functools.partial(attend, mask=Causal(), scale=1.0, plan=plan, backend="xla"))
    out, lse = run(zeros(T, 2), zeros(S, 1), zeros(S, 1), own(T), own(S))
    assert out.shape == (1, T, 2, 4) and not out.any() and np.isneginf(lse).all()


SHARDS = {
    "heads apart, a list a key head": (MeshSpec(data=2, tensor=2), Rules(), K),
    "rows apart": (MeshSpec(data=2), Rules(), 1),
    "a list a query head": (MeshSpec(tensor=2), Rules(), H),
    "key heads on every device": (MeshSpec(tensor=4), Rules(kv_heads=()), K),
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if n else ()) for n, way in enumerate(SHARDS)])
def test_rows_and_heads_on_a_mesh(way):
    mesh, rules, groups = SHARDS[way]
    plan, inputs = random_plan(1, groups), given(1)
    options = {"rules": rules, "communication": Ring(), "mask": Causal(), "scale": 0.4, "backend": "reference"}
    with jax.set_mesh(mesh.build()):
        got = with_gradient(lambda *a: sharded_attend(*a[:-1], plan=a[-1], **options))(*inputs, plan)
    compare(got, dense(Causal())(*inputs, jnp.asarray(pairs(plan))))


def test_a_plan_where_the_sequence_is_sharded_is_refused():
    q, k, v, _, _, *infos = given(0)
    options = {"rules": Rules(), "communication": Ring(), "mask": Causal(), "scale": 0.4}
    with jax.set_mesh(MeshSpec(context=2).build()), pytest.raises(ValueError, match="rows shared out over context"):
        sharded_attend(q, k, v, *infos, plan=random_plan(0, 1), **options)


def test_what_does_not_fit_is_refused():
    q, k, v, _, _, *infos = given(0)
    run = lambda plan, **options: attend(q, k, v, *infos, mask=Causal(), scale=1.0, plan=plan, **options)
    with pytest.raises(ValueError, match="2 rows and 3 groups: expected 2 rows and 1, 2 or 4 groups"):
        run(random_plan(0, 3))
    with jax.set_mesh(MeshSpec(tensor=2).build()), pytest.raises(ValueError, match="3 groups: expected 2 rows and 1, 2 or 4"):
        sharded_attend(q, k, v, *infos, plan=random_plan(0, 3), rules=Rules(), communication=Ring(), mask=Causal(), scale=1.0)
    with pytest.raises(ValueError, match=r"plan: cols \(2, 1, 18\): expected \(2, 2, 18\)"):
        plan = random_plan(0, 2)
        leaves, tree = jax.tree.flatten(plan)  # rebuilt unchecked
        run(tree.unflatten([random_plan(0, 1).cols if leaf is plan.cols else leaf for leaf in leaves]))
    with pytest.raises(ValueError, match="1 rows and 1 groups"):
        run(random_plan(0, 1, rows=1))
    with pytest.raises(ValueError, match="columns of 4 query blocks: expected 3"):
        run(dataclasses.replace(random_plan(0, 1, 2, T=64), lengths=(T, S)))


@pytest.mark.parametrize("lengths", [(T + 1, S), (T, S - 1)], ids=["queries", "keys"])
def test_a_plan_of_other_lengths_is_refused(lengths):
    """Of as many blocks too, in which its last tile would be another."""
    q, k, v, _, _, *infos = given(0)
    plan = random_plan(0, 1, T=lengths[0], S=lengths[1])
    expected = re.escape(f"plan: made for lengths = {lengths} of queries and keys: expected those of q and k, {(T, S)}")
    with pytest.raises(ValueError, match=expected):
        attend(q, k, v, *infos, mask=Causal(), scale=1.0, plan=plan)


def test_a_block_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"dense_plan: block = \(0, 64\): expected at least 1 token a side"):
        dense_plan(Causal(), *given(0, "packed")[-2:], block=(0, 64))


@pytest.mark.parametrize(
    "form, block, expected",
    [("tpu", (128, 192), "multiples of 128"), ("gpu", (48, 16), "powers of two from 16"), ("xla", (16, 0), "at least 1 token")],
)
def test_blocks_that_a_form_does_not_take_are_refused(form, block, expected):
    with pytest.raises(ValueError, match=re.escape(f"plan: block = {block} in the form {form!r}: expected {expected}")):
        Planned(form, Causal(), 1.0, None, block)
