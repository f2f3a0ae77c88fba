"""The pair of functions that a fold is: gradients of the dense form, and of keys in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_xla import arrays, compare, random_tokens, whole_document, with_gradient

from lcx.attention.mask import Causal, Hide, Sink, Window
from lcx.attention.merge import merge
from pallas_kernels.tile_attention import op, reference, xla
from pallas_kernels.tile_attention.tokens import Tokens

CASES = [(Causal(), None), (Window(size=9) | (Sink(size=3) & Hide(query_role=1, key_role=0)), 2.0)]


@pytest.mark.parametrize("mask, softcap", CASES)
def test_the_dense_backward_is_the_gradient_of_the_dense_forward(mask, softcap):
    written = with_gradient(functools.partial(op.attention, op.Tiled("reference", mask, 0.4, softcap)))
    derived = with_gradient(functools.partial(reference.forward, mask=mask, scale=0.4, softcap=softcap))
    for seed, kind in enumerate(("packed", "special", "shuffled", "padding")):
        rng = np.random.default_rng(seed)
        given = *arrays(rng, 4, 15, 20, 4, 2, 8, 5), random_tokens(rng, 4, 15, kind), random_tokens(rng, 4, 20, kind)
        compare(written(*given), derived(*given), 1e-6)


@pytest.mark.parametrize("form", [pytest.param("reference", marks=pytest.mark.slow), "xla"])  # kernels: in their own tests
@pytest.mark.parametrize("mask, softcap", CASES)
def test_parts_of_the_keys_add_up(form, mask, softcap):
    """Each part is given the lse and delta of the whole."""
    rng = np.random.default_rng(0)
    fold = op.Tiled(form, mask, 0.4, softcap)
    q, k, v, d_out, d_lse = arrays(rng, 2, 33, 40, 4, 2, 8, 6)
    q_tokens, k_tokens = random_tokens(rng, 2, 33, "special"), random_tokens(rng, 2, 40, "special")
    whole = with_gradient(functools.partial(reference.forward, mask=mask, scale=0.4, softcap=softcap))
    out, lse, *gradients = whole(q, k, v, d_out, d_lse, q_tokens, k_tokens)
    delta = jnp.sum(d_out * out, axis=-1) - jnp.where(lse == -jnp.inf, 0, d_lse)
    cuts = [slice(0, 7), slice(7, 39), slice(39, 40)]
    parts = [(k[:, cut], v[:, cut], Tokens(*(field[:, cut] for field in k_tokens))) for cut in cuts]
    merged = functools.reduce(merge, (fold.forward(q, k, v, q_tokens, tokens) for k, v, tokens in parts))
    pulled = [fold.backward(q, k, v, q_tokens, tokens, lse, delta, d_out) for k, v, tokens in parts]
    dq = sum(part[0] for part in pulled)
    dk, dv = (jnp.concatenate([part[i] for part in pulled], axis=1) for i in (1, 2))
    compare((*merged, dq, dk, dv), (out, lse, *gradients), 2e-6)


def test_a_policy_may_keep_what_attention_gave():
    """Under rematerialisation that keeps the named (out, lse), the backward pass does not attend again."""
    rng = np.random.default_rng(0)
    q, k, v, *_ = arrays(rng, 1, 16, 16, 2, 1, 8, 8)
    tokens = random_tokens(rng, 1, 16, "packed")
    calls = []

    class Counted(op.Tiled):
        def forward(self, *given):
            calls.append(1)
            return super().forward(*given)

    fold = Counted("reference", Causal(), 0.4)
    body = lambda q: jnp.sin(op.attention(fold, jnp.sin(q), k, v, tokens, tokens)[0]).sum()
    keep = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(op.SAVED))
    jaxpr = lambda f: str(jax.make_jaxpr(jax.grad(f))(q))
    assert jaxpr(keep).count("reduce_max") == 1 < jaxpr(jax.checkpoint(body)).count("reduce_max")


def test_the_dense_forward_is_differentiable_at_very_negative_scores():
    q, k = jnp.ones((1, 4, 1, 1)), -jnp.arange(100.0, 104.0).reshape(1, 4, 1, 1)
    v, tokens = jnp.arange(4.0).reshape(1, 4, 1, 1), whole_document(1, 4)
    loss = lambda form: lambda q, k: form(q, k, v, tokens, tokens)[0].sum()
    derived = jax.grad(loss(functools.partial(reference.forward, mask=Causal(), scale=1.0)), argnums=(0, 1))(q, k)
    written = jax.grad(loss(functools.partial(op.attention, op.Tiled("reference", Causal(), 1.0))), argnums=(0, 1))(q, k)
    for value, other in zip(written, derived, strict=True):
        np.testing.assert_allclose(value, other, atol=1e-4)


def test_float32_products_ask_for_float32():
    """On a TPU or GPU the default would round their operands."""
    q, tokens = jnp.ones((1, 32, 1, 8)), whole_document(1, 32)
    fold = op.Tiled("xla", Causal(), 1.0, None, xla.Sizes(16, 16, 1))
    with jax.default_matmul_precision("default"):
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda q: op.attention(fold, q, q, q, tokens, tokens)[0].sum()))(q))
    assert jaxpr.count("dot_general[") == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0
