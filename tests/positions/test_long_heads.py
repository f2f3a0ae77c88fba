"""LongHeads: chosen chunks and their numbers in float64, gradients, rows in any order on one device and many, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.all_gather import AllGather
from lcx.attention.attend import attend
from lcx.attention.mask import Causal, Window
from lcx.attention.ring import Ring
from lcx.attention.sharded import sharded_attend
from lcx.attention.ulysses import Ulysses
from lcx.batch import SHARED, causal_info
from lcx.mixers.attention import Attention
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.distance_plan import Distances
from lcx.positions.long_heads import LongHeads
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.spec import SpecError

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.4
TWO = np.array([1] * 23 + [2] * 31 + [0] * 2)


def given(length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (1, length, HEADS, DIM), *((1, length, KV_HEADS, DIM),) * 2
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def run(plan, segments, q, k, v, form=attend, repeat=1, softcap=None):
    info = causal_info(jnp.asarray(segments)[None])
    distances = Distances(plan, Rope(), DIM, q.shape[1])
    k, v = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
    return form(q, plan.held(q, k), v, info, info, mask=Causal(), scale=SCALE, softcap=softcap, distances=distances)


def turned(x, places):
    theta = 1e4 ** -(np.arange(0, DIM, 2) / DIM)
    z = (x[..., : DIM // 2] + 1j * x[..., DIM // 2 :]) * np.exp(1j * np.asarray(places)[..., None] * theta)
    return np.concatenate([z.real, z.imag], axis=-1)


def softmax(s):
    weights = np.exp(s - s.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def by_hand(plan, segments, q, k, v, softcap=None):
    """Query by query: the chosen tokens one behind the other, numbered from 0. Logits of summaries are capped too."""
    capped = lambda s: s if softcap is None else softcap * np.tanh(s / softcap)
    size, out = plan.chunk, np.zeros(q.shape[1:])
    for segment, h in ((s, h) for s in set(segments) - {0} for h in range(HEADS)):
        at, group = np.flatnonzero(segments == segment), HEADS // KV_HEADS
        Q, K, V = (np.asarray(x, np.float64)[0, at, head] for x, head in ((q, h), (k, h // group), (v, h // group)))
        summary = []
        for begin in range(0, len(at) - size + 1, size):
            chunk = slice(begin, begin + size)
            asking, keys = turned(Q[chunk], np.arange(size)), turned(K[chunk], np.arange(size))
            mean = (softmax(capped(asking @ keys.T * SCALE)) @ V[chunk]).mean(axis=0)
            summary.append(softmax(capped(keys @ mean * SCALE)) @ keys)
        for i in range(len(at)):
            own = i // size
            best = sorted(range(1, own - 1), key=lambda c: -(Q[i] @ summary[c]))[: plan.chunks - 3]
            seen = [c * size + n for c in sorted({0, *best, max(own - 1, 0), own}) for n in range(size) if c * size + n <= i]
            weights = softmax(capped(turned(K[seen], np.arange(len(seen))) @ turned(Q[i], len(seen) - 1) * SCALE))
            out[at[i], h] = weights @ V[seen]
    return out


@pytest.mark.parametrize(
    "plan, softcap",
    [
        pytest.param(LongHeads(chunk=4, chunks=3), None, marks=pytest.mark.slow),
        (LongHeads(chunk=4, chunks=5), 0.8),
        pytest.param(LongHeads(chunk=1, chunks=6), None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attention_equals_the_definition(plan, softcap):
    """Of two documents and padding, keys of a group and keys of their own, in order and not."""
    q, k, v = given(len(TWO))
    expected = by_hand(plan, TWO, q, k, v, softcap)
    out = jax.jit(functools.partial(run, plan, TWO, softcap=softcap))(q, k, v)[0]
    np.testing.assert_allclose(out[0], expected, atol=2e-6)
    own = jax.jit(functools.partial(run, plan, TWO, repeat=2, softcap=softcap))(q, k, v)[0]
    np.testing.assert_allclose(own, out, atol=1e-6)
    info, order = causal_info(TWO[None]), np.random.default_rng(1).permutation(len(TWO))
    shuffled = jax.tree.map(lambda x: x[:, order], info)
    options = {"mask": Causal(), "scale": SCALE, "softcap": softcap, "distances": Distances(plan, Rope(), DIM, len(TWO))}
    held = plan.held(q, k)
    out = jax.jit(functools.partial(attend, **options))(q, held[:, order], v[:, order], info, shuffled)[0]
    np.testing.assert_allclose(out[0], expected, atol=2e-6)


def test_the_gradient_is_that_of_the_definition():
    """Along a direction in which no choice changes; the choice itself has none. Logits are capped."""
    plan, softcap, rng = LongHeads(chunk=4, chunks=4), 1.5, np.random.default_rng(2)
    arrays, d_out = given(40, seed=2), rng.normal(size=(1, 40, HEADS, DIM))
    segments = np.ones(40, int)
    steps = [rng.normal(size=x.shape) * 1e-6 for x in arrays]
    loss = lambda *arrays: float((by_hand(plan, segments, *arrays, softcap) * d_out[0]).sum())
    wide = [np.asarray(x, np.float64) for x in arrays]
    ahead, behind = (loss(*(x + sign * step for x, step in zip(wide, steps, strict=True))) for sign in (1, -1))
    found = jax.jit(
        jax.grad(lambda *arrays: jnp.sum(run(plan, segments, *arrays, softcap=softcap)[0] * d_out), argnums=(0, 1, 2))
    )(*arrays)
    along = sum(float((g * step).sum()) for g, step in zip(found, steps, strict=True))
    assert along == pytest.approx((ahead - behind) / 2, rel=1e-4)


@pytest.mark.slow
def test_rows_that_see_all_are_plain_attention():
    """Value, lse and gradients, with a cotangent of the lse: what merging parts of attention needs."""
    q, k, v = given(30, seed=3)
    segments, plan, rope = np.ones(30, int), LongHeads(chunk=8, chunks=4), Rope().frequencies(DIM, 30)
    info = causal_info(segments[None])
    plain = lambda q, k, v: attend(
        rotate(q, info.positions, rope), rotate(k, info.positions, rope), v, info, info, mask=Causal(), scale=SCALE
    )
    both = []
    for form in (functools.partial(run, plan, segments), plain):
        (out, lse), pull = jax.vjp(jax.jit(form), q, k, v)
        both.append((out, lse, *pull((jnp.sin(out), jnp.cos(lse)))))
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("communication", [AllGather(), pytest.param(Ulysses(), marks=pytest.mark.slow)], ids=str)
def test_rows_over_four_devices(communication):
    plan, (q, k, v) = LongHeads(chunk=4, chunks=4), given(len(TWO), seed=4)

    def both(**options):
        out, pull = jax.vjp(lambda *arrays: run(plan, TWO, *arrays, repeat=2, **options)[0], q, k, v)
        return out, *pull(jnp.sin(out))

    wanted = jax.jit(both)()
    with jax.set_mesh(MeshSpec(context=4).build()):
        form = functools.partial(sharded_attend, rules=Rules(), communication=communication)
        found = jax.jit(lambda: both(form=form))()
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_rows_that_all_documents_see_are_not_defined():
    q, k, v = given(12)
    segments = np.array([SHARED] + [1] * 11)
    assert np.isnan(jax.jit(functools.partial(run, LongHeads(chunk=4, chunks=3), segments))(q, k, v)[0]).all()


def test_refusals():
    q, k, v = given(16)
    plan, info = LongHeads(chunk=4, chunks=3), causal_info(np.ones((1, 16), np.int32))
    call = functools.partial(attend, q_info=info, k_info=info, scale=SCALE, distances=Distances(plan, Rope(), DIM, 16))
    with pytest.raises(ValueError, match="keys of 8: expected keys with 2 queries behind each, from the plan's `held`"):
        call(q, k, v, mask=Causal())
    with pytest.raises(
        ValueError, match=r"mask = Window\(size=3\) with LongHeads.*expected Causal\(\), of which it chooses a part"
    ):
        call(q, plan.held(q, k), v, mask=Window(size=3))
    with jax.set_mesh(MeshSpec(context=4).build()):
        with pytest.raises(ValueError, match=r"with Ring\(\): expected AllGather\(\) or Ulysses\(\), of whole rows"):
            run(
                plan,
                np.ones(16, int),
                q,
                k,
                v,
                repeat=2,
                form=functools.partial(sharded_attend, rules=Rules(), communication=Ring()),
            )
        with pytest.raises(ValueError, match=r"2 key heads with LongHeads.*expected one of each query head"):
            run(
                plan,
                np.ones(16, int),
                q,
                k,
                v,
                form=functools.partial(sharded_attend, rules=Rules(), communication=AllGather()),
            )
    with pytest.raises(SpecError, match=r"distances = LongHeads.*: expected None beside another mask than Causal\(\)"):
        Attention(heads=2, kv_heads=1, head_dim=8, distances=plan, mask=Window(size=3))
    with pytest.raises(SpecError, match=r"LongHeads.chunks = 2: expected at least 3"):
        LongHeads(chunks=2)
