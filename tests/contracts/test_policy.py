"""Every policy keeps the contract of `compress`: what stays has its place, order and budget, and is of what is there alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.mask import Causal
from lcx.batch import causal_info
from lcx.cache.kv_state import hidden
from lcx.cache.policies.policy import Kept, Policy
from lcx.cache.scorers.scorer import Asked, Rule, Scored
from lcx.parts import parts
from tests.cache.driven import DIM, FREQUENCIES, HEADS, KV_HEADS, SCALE, VALUE

LENGTH, PASS, AWAY = 64, 8, 9
RULE = Rule(mask=Causal(), scale=SCALE, softcap=None, bias=None)


def scored(policy, beyond=0.0) -> tuple[Scored, int]:
    """(two rows of random tokens, the second of `AWAY` fewer than the first, slots). beyond: what stands where no token is."""
    rng, slots = np.random.default_rng(0), policy.slots(LENGTH, policy.share(0, 1))
    N, G, W = slots + PASS, KV_HEADS if policy.by_head else 1, policy.queries
    count = jnp.asarray([N, N - AWAY])
    there = jnp.arange(N) < count[:, None]
    some = lambda *shape: jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
    of_tokens = lambda x: jnp.where(there.reshape(2, 1, N, *(1,) * (x.ndim - 3)), x, beyond)
    k, v, marks = (of_tokens(some(KV_HEADS, N, *size)) for size in ((DIM,), (VALUE,), ()))
    info = causal_info(jnp.ones((2, N), int)).filled()
    info = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (2, G, *x.shape[1:])), info)
    newest = some(W, HEADS, DIM)
    last = causal_info(jnp.ones((2, W + 1), int), start=count - W - 1).take(slice(1, None))
    output = jnp.ones((HEADS, VALUE, 5))
    asked = Asked(q=newest, raw=newest, out=some(W, HEADS, VALUE), lse=some(W, HEADS), info=last, output=output)
    known = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), policy.tables(0, KV_HEADS, DIM))
    return Scored(
        k=k,
        raw=k,
        v=v,
        info=hidden(info, there[:, None]),
        count=jnp.broadcast_to(count[:, None], (2, G)),
        newest=newest,
        newest_info=last,
        marks=jnp.abs(marks) if policy.marks else None,
        counts=jnp.ones((2, KV_HEADS, N)) if policy.merges else None,
        watched=policy.watch(policy.watching(2, HEADS, DIM), asked),
        known=known,
        seen=count,
        budget=policy.budget(count, policy.share(0, 1)),
        output=output,
        frequencies=FREQUENCIES,
        rule=RULE,
        leader=None,
    ), slots


@functools.cache
def kept(policy, beyond=0.0) -> tuple[Scored, int, Kept]:
    now, slots = scored(policy, beyond)
    return now, slots, jax.tree.map(np.asarray, jax.jit(lambda: policy.compress(now, slots))())


EXAMPLES = [
    pytest.param(policy, id=f"{cls.__name__}-{n}", marks=() if n == 0 else pytest.mark.slow)
    for cls in parts(Policy)
    for n, policy in enumerate(cls.examples())
]


@pytest.mark.parametrize("policy", EXAMPLES)
def test_what_stays_stands_in_front_in_its_order_within_the_budget(policy):
    now, slots, found = kept(policy)
    G = KV_HEADS if policy.by_head else 1
    assert found.index.shape == found.there.shape == (2, G, slots)
    for new, size in ((found.k, DIM), (found.v, VALUE)):
        assert new is None or new.shape == (2, KV_HEADS, slots, size)
    assert found.counts is None or (policy.merges and found.counts.shape == (2, KV_HEADS, slots))
    index, there = found.index, found.there
    assert (there[..., 1:] <= there[..., :-1]).all()
    assert (np.diff(index, axis=2) > 0)[there[..., 1:]].all()
    assert (index >= 0).all() and (index < np.asarray(now.count)[..., None])[there].all()
    assert (there.sum(axis=(1, 2)) <= G * np.minimum(now.budget, slots)).all()
    assert there.any(axis=2).all()


@pytest.mark.parametrize("policy", EXAMPLES)
def test_what_is_not_there_takes_no_part(policy):
    """Slots that hold no token hold what stood in them before."""
    (_, _, found), (_, _, wanted) = kept(policy, 1000.0), kept(policy)
    np.testing.assert_array_equal(found.there, wanted.there)
    where = np.broadcast_to(found.there, (2, KV_HEADS, found.there.shape[2]))
    for field in dataclasses.fields(Kept):
        one, other = (getattr(x, field.name) for x in (found, wanted))
        if one is not None:
            mask = found.there if one.shape[1] == found.there.shape[1] else where
            np.testing.assert_allclose(one[mask], other[mask], atol=1e-6)
