"""Learned sinks equal a float64 softmax with one more column, in value and gradient, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from infos import random_info

from lcx.attention.all_gather import AllGather
from lcx.attention.attend import attend
from lcx.attention.mask import Causal, Sink, Window, tokens_of
from lcx.attention.merge import merge, with_sinks
from lcx.attention.ring import Ring
from lcx.attention.sharded import sharded_attend
from lcx.attention.ulysses import RingUlysses, Ulysses
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules

B, T, H, K, D, E = 2, 16, 8, 2, 8, 6
WINDOW = Sink(size=2) | Window(size=4)
HEADS = MeshSpec(context=4, tensor=2), Rules()
TWO_AXES = MeshSpec(fsdp=2, context=4), Rules(batch=("data",), sequence=("fsdp", "context"))
WAYS = {
    "all-gather": (AllGather(), HEADS),
    "ring": (Ring(), HEADS),
    "all-to-all": (Ulysses(), HEADS),
    "ring of all-to-alls": (RingUlysses(), TWO_AXES),
}


@pytest.fixture(scope="module")
def case():
    """q, k, v, sinks, the cotangent of out, and tokens of which some see nothing."""
    rng = np.random.default_rng(0)
    shapes = (B, T, H, D), (B, T, K, D), (B, T, K, E), (H,), (B, T, H, E)
    return *(jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes), random_info(rng, B, T, "special")


def with_gradient(form):
    """(out, dq, dk, dv, dsinks) of a form (q, k, v, sinks, info) -> out."""

    def run(q, k, v, sinks, d_out, info):
        out, pull = jax.vjp(lambda *arrays: form(*arrays, info), q, k, v, sinks)
        return out, *pull(d_out)

    return jax.jit(run)


def another_column(mask):
    """Softmax over the visible keys and one logit more, in float64."""

    def form(q, k, v, sinks, info):
        seen = mask.visible(tokens_of(info).rows(), tokens_of(info).columns())[:, None]
        k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
        logits = jnp.where(seen, 0.3 * jnp.einsum("bthd,bshd->bhts", q, k), -jnp.inf)
        column = jnp.broadcast_to(sinks[:, None, None], (B, H, T, 1))
        p = jax.nn.softmax(jnp.concatenate([logits, column], axis=-1), axis=-1)[..., :-1]
        return jnp.einsum("bhts,bshe->bthe", p, v)

    def wide(*given):
        with jax.enable_x64(True):
            *arrays, info = given
            return with_gradient(form)(*(np.asarray(x, np.float64) for x in arrays), info)

    return wide


def compare(got, expected):
    for name, value, other in zip(("out", "dq", "dk", "dv", "dsinks"), got, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("mask", [Causal(), WINDOW], ids=["causal", "window"])
def test_equal_a_softmax_with_one_more_column(case, mask, backend):
    def form(q, k, v, sinks, info):
        return with_sinks(*attend(q, k, v, info, info, mask=mask, scale=0.3, backend=backend), sinks)

    got = with_gradient(form)(*case)
    compare(got, another_column(mask)(*case))
    nothing = np.asarray(case[-1].segments) == 0
    assert nothing.any() and not np.asarray(got[0])[nothing].any() and not np.asarray(got[1])[nothing].any()


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way == "ring" else pytest.mark.slow) for way in WAYS])
def test_on_a_mesh(case, way):
    communication, (mesh, rules) = WAYS[way]

    def form(q, k, v, sinks, info):
        options = {"rules": rules, "communication": communication, "mask": WINDOW, "scale": 0.3}
        return with_sinks(*sharded_attend(q, k, v, info, info, **options), sinks)

    with jax.set_mesh(mesh.build()):
        got = with_gradient(form)(*case)
    compare(got, another_column(WINDOW)(*case))


@pytest.mark.parametrize("lse", [-jnp.inf, -3000.0, -1.0, 90.0, 3000.0])
@pytest.mark.parametrize("sink", [-200.0, 0.0, 200.0])
def test_are_the_part_that_brings_no_value(lse, sink):
    out = jnp.zeros((1, 1, 1, 2)) if lse == -jnp.inf else jnp.ones((1, 1, 1, 2))
    part, sinks = (out, jnp.full((1, 1, 1), lse)), jnp.asarray([sink])
    expected, _ = merge(part, (jnp.zeros_like(out), jnp.broadcast_to(sinks, (1, 1, 1))))
    np.testing.assert_allclose(with_sinks(*part, sinks), expected, rtol=1e-6)
    gradient = jax.grad(lambda out, lse, sinks: with_sinks(out, lse, sinks).sum(), (0, 1, 2))(*part, sinks)
    assert all(np.isfinite(x).all() for x in gradient)
