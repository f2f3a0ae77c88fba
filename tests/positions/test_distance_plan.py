"""Distance plans: the distances they give, regions that are apart and cover all, attention over them on one device and many."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.attend import attend
from lcx.attention.mask import Causal, Sink, Window, tokens_of
from lcx.attention.ring import Ring
from lcx.attention.sharded import sharded_attend
from lcx.batch import TokenInfo, causal_info
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.parts import parts
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.distance_plan import Distances, RegionPlan
from lcx.positions.dual_chunk import DualChunk
from lcx.positions.long_heads import LongHeads
from lcx.positions.query_scale import LogLength, LogN, Stepped
from lcx.positions.rerope import ReRoPE
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.positions.self_extend import SelfExtend
from lcx.spec import SpecError

PLANS = [plan for cls in parts(RegionPlan) for plan in cls.examples()]
DIM = 8


def distances_of(plan, length):
    """[query, key] distance of the first pair of channels, as the regions give it; NaN in none."""
    index = jnp.arange(length)[None]
    tokens = tokens_of(causal_info(np.ones((1, length), np.int32)))
    found = np.full((length, length), np.nan)
    for region in plan.regions(DIM // 2):
        place = lambda to: np.asarray(to(index))[0, :, 0]
        seen = np.asarray(region.mask.term(tokens.rows(), tokens.columns()))[0]
        found = np.where(seen, place(region.query)[:, None] - place(region.key)[None], found)
    return found


def test_published_distances():
    """Of query 23, and of two queries of the dual-chunk paper's example."""
    row = lambda plan: distances_of(plan, 24)[23].tolist()
    near = [7, 6, 5, 4, 3, 2, 1, 0]
    assert row(SelfExtend(group=4, window=8)) == [n for n in (11, 10, 9, 8) for _ in range(4)] + near
    assert row(ReRoPE(window=8)) == [8] * 16 + near
    assert row(ReRoPE(window=8, leak=4.0)) == [8 + n / 4 for n in range(15, -1, -1)] + near
    dual = distances_of(DualChunk(chunk=6, clip=9), 12)
    assert dual[6, :7].tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert dual[11].tolist() == [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    "plan, trained, every, some",
    [
        (SelfExtend(group=4, window=8), 16, 40, 40),  # (16 - 8) 4 + 8
        (SelfExtend(group=4, window=8), 8, 8, 8),
        (SelfExtend(group=4, window=32), 16, 16, 16),  # near keys alone go beyond
        (SelfExtend(group=3, window=6, bidirectional=True), 10, 18, 18),
        (ReRoPE(window=8), 9, None, None),
        (ReRoPE(window=8), 8, 8, 8),  # a ninth token would stand at 8
        (ReRoPE(window=8, leak=4.0), 16, 40, 40),  # 8 + (39 - 8) / 4 = 15.75
        (ReRoPE(window=8, leak=1.0), 16, 16, 16),
        (ReRoPE(window=20, leak=4.0), 16, 16, 16),
        (DualChunk(chunk=6, clip=9), 10, None, None),
        (DualChunk(chunk=6, clip=9), 9, 9, 9),
        (DualChunk(chunk=6, clip=20), 20, 12, 12),  # the third chunk stands at 20 from the first
        (DimensionGroups(groups=(1, 4), window=8), 16, 16, 40),
        (DimensionGroups(groups=(2, 4), window=8), 16, 24, 40),
        (DimensionGroups(groups=(2, 4), window=8, dimensions="chosen.npy"), 16, 16, 40),
        (LongHeads(chunk=4, chunks=4), 16, None, None),
        (LongHeads(chunk=4, chunks=4), 15, 15, 15),
    ],
    ids=str,
)
def test_how_far_a_plan_reads_by_hand(plan, trained, every, some):
    assert plan.reach(trained) == (every, some)


@pytest.mark.parametrize("plan", [plan for plan in PLANS if not isinstance(plan, DimensionGroups)], ids=str)
def test_how_far_a_plan_reads_is_where_its_distances_reach_the_trained_length(plan):
    found = np.tril(np.nan_to_num(distances_of(plan, 60)))
    for trained in range(1, 16):
        within = [n for n in range(1, 61) if found[:n, :n].max() < trained]
        assert max(within) == min(60, plan.reach(trained).every or 60)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_regions_are_apart_and_cover_all(plan):
    tokens = tokens_of(causal_info(np.ones((1, 50), np.int32)))
    seen = sum(np.asarray(r.mask.term(tokens.rows(), tokens.columns())).astype(int) for r in plan.regions(DIM // 2))[0]
    wanted = np.ones((50, 50), bool) if plan.both_ways else np.tri(50, dtype=bool)
    assert (seen[wanted] == 1).all()


def given(rng, length=40, heads=4):
    q, d_out = rng.normal(size=(2, 1, length, heads, DIM)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, length, 2, DIM)).astype(np.float32)
    return q, k, v, d_out


def dense(plan, mask, info, q, k, v):
    """Logit by logit in float64, with the rotation of every pair by the plan's positions."""
    tokens, index = tokens_of(info), np.asarray(info.index)
    seen = np.asarray(mask.visible(tokens.rows(), tokens.columns()))[0]
    theta = 1e4 ** -(np.arange(0, DIM, 2) / DIM)
    group = q.shape[2] // k.shape[2]
    logits = np.full((q.shape[2], *seen.shape), -np.inf)
    for region in plan.regions(DIM // 2):
        axes = np.zeros(DIM // 2, int) if region.axes is None else region.axes
        at_q, at_k = (np.asarray(to(jnp.asarray(index)), np.float64)[0][:, axes] for to in (region.query, region.key))
        inside = seen & np.asarray(region.mask.term(tokens.rows(), tokens.columns()))[0]
        turn = np.exp(1j * (at_q[:, None] - at_k[None]) * theta)
        for h in range(q.shape[2]):
            a = q[0, :, h, : DIM // 2] + 1j * q[0, :, h, DIM // 2 :]
            b = k[0, :, h // group, : DIM // 2] + 1j * k[0, :, h // group, DIM // 2 :]
            product = np.einsum("ic,jc,ijc->ij", a.astype(complex), b.conj().astype(complex), turn).real * 0.4
            logits[h] = np.where(inside, product, logits[h])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hij,jhe->ihe", weights, np.repeat(v[0], group, axis=1))


@pytest.mark.parametrize("plan, mask", zip(PLANS, itertools.cycle([Causal(), Sink(size=2) | Window(size=17)])), ids=str)
def test_attention_equals_the_rotation_of_every_pair(plan, mask):
    rng = np.random.default_rng(0)
    q, k, v, _ = given(rng)
    info = causal_info(np.asarray([[1] * 11 + [2] * 29]))
    if plan.both_ways:
        info = TokenInfo(index=info.index, order=jnp.zeros_like(info.order), positions=info.positions, segments=info.segments)
    distances = Distances(plan, Rope(), DIM, 40)
    out, _ = jax.jit(functools.partial(attend, mask=mask, scale=0.4, distances=distances))(q, k, v, info, info)
    np.testing.assert_allclose(out[0], dense(plan, mask, info, q, k, v), atol=3e-6)


@pytest.mark.parametrize(
    "plan", [SelfExtend(group=2, window=4), pytest.param(DualChunk(chunk=4, clip=6), marks=pytest.mark.slow)], ids=str
)
def test_rings_turn_what_travels(plan):
    """Value and gradient over four devices, keys of a packed row going round raw."""
    q, k, v, d_out = given(np.random.default_rng(0))
    info = causal_info(np.asarray([[1] * 27 + [2] * 13]))
    options = {"mask": Causal(), "scale": 0.4, "distances": Distances(plan, Rope(), DIM, 40)}

    def run(form):
        out, pull = jax.vjp(lambda q, k, v: form(q, k, v, info, info, **options)[0], q, k, v)
        return out, *pull(d_out)

    wanted = jax.jit(lambda: run(attend))()
    with jax.set_mesh(MeshSpec(context=4).build()):
        ring = functools.partial(sharded_attend, rules=Rules(), communication=Ring())
        found = jax.jit(lambda: run(ring))()
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(np.abs(b).max()))


def outcome(plan, length=40):
    q, k, v, d_out = given(np.random.default_rng(1), length)
    info = causal_info(np.ones((1, length), np.int32))
    options = {"mask": Causal(), "scale": 0.4, "backend": "reference"}  # forms are compared above

    def form(q, k, v):
        if plan is not None:
            return attend(q, k, v, info, info, **options, distances=Distances(plan, Rope(), DIM, length))[0]
        turned = (rotate(x, info.positions, Rope().frequencies(DIM, length)) for x in (q, k))
        return attend(*turned, v, info, info, **options)[0]

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(form, q, k, v)
        return out, *pull(d_out)

    return both(q, k, v, d_out)


@pytest.mark.parametrize(
    "plan, other",
    [
        (ReRoPE(window=5, leak=1.0), None),
        (SelfExtend(group=1, window=5), None),
        (SelfExtend(group=4, window=40), None),
        (DualChunk(chunk=40, clip=40), None),
        (DimensionGroups(groups=(4, 4), window=8), SelfExtend(group=4, window=8)),
        (ReRoPE(window=8, leak=1e9), ReRoPE(window=8)),
    ],
    ids=["no leak is rope", "groups of one", "all near", "one chunk", "equal groups are self-extend", "nothing leaks"],
)
def test_plans_that_are_others(plan, other):
    for a, b in zip(outcome(plan), outcome(other), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_query_scales():
    scale = lambda rule, place: float(rule.scale(jnp.asarray([[place]]))[0, 0])
    assert scale(LogN(original_length=256), 1023) == pytest.approx(1.25)
    assert scale(LogN(original_length=256), 100) == 1
    whole = lambda n, **options: float(LogLength(original_length=256, **options).scale(None, None, jnp.asarray([[n]]))[0, 0])
    assert whole(1024) == pytest.approx(1.25) and whole(16) == 1 and whole(16, least="none") == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"info\.lengths: None, but this query scale depends on the length"):
        LogLength(original_length=256).scale(jnp.zeros((1, 1), jnp.int32))
    skipping, far = LogN(original_length=256, skip_layers=2), jnp.asarray([[1023]])
    assert [float(skipping.scale(far, jnp.asarray(layer))[0, 0]) for layer in range(3)] == pytest.approx([1, 1, 1.25])
    with pytest.raises(ValueError, match=r"LogN.skip_layers = 2: expected 0 outside the layers of a model"):
        skipping.scale(far)
    for place, wanted in ((8190, 1.0), (8191, 1.0693147), (40_000, 1.1609438)):
        assert scale(Stepped(), place) == pytest.approx(wanted, rel=1e-6)


def test_what_cannot_turn_is_refused():
    with pytest.raises(SpecError, match=r"window = 6: expected a multiple of group = 4"):
        SelfExtend(group=4, window=6)
    with pytest.raises(SpecError, match=r"clip = 5: expected at least chunk = 6"):
        DualChunk(chunk=6, clip=5)
    with pytest.raises(SpecError, match=r"distances = .*: expected None where rope is 'none'"):
        Attention(heads=2, kv_heads=1, head_dim=8, rope="none", distances=ReRoPE(window=4))
    with pytest.raises(SpecError, match=r"distances = .*: expected None where the model has no rope"):
        inherited = Inherited(width=16, depth=1, rope=None, compute="float32", rules=Rules())
        Attention(heads=2, kv_heads=1, head_dim=8, distances=ReRoPE(window=4)).build(inherited, rngs=nnx.Rngs(0))
    info = causal_info(np.ones((1, 4), np.int32))
    with pytest.raises(SpecError, match=r"groups = .*: expected as many as divide the 4 rotated pairs"):
        attend(
            *(jnp.zeros((1, 4, 1, DIM)),) * 3,
            info,
            info,
            mask=Causal(),
            scale=1.0,
            distances=Distances(DimensionGroups(groups=(1, 2, 4), window=4), Rope(), DIM, 4),
        )
