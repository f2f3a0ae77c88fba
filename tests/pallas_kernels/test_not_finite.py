"""What is not finite and is seen makes a row NaN in every form, never a row that sees nothing; unseen it does nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import arrays, whole_document

from lcx.attention.mask import Causal
from pallas_kernels.tile_attention import reference, tpu, triton, xla

T = 24
FORMS = {
    "reference": reference.forward,
    "xla": xla.forward,
    "xla in tiles": functools.partial(xla.forward, sizes=xla.Sizes(8, 8, 1)),
    "tpu": functools.partial(tpu.forward, interpret=True),
    "triton": functools.partial(triton.forward, interpret=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_reaches_the_rows_that_see_it(form):
    q, k, v, *_ = arrays(np.random.default_rng(0), 1, T, T, 2, 1, 8, 8)
    tokens = whole_document(1, T)
    run = jax.jit(lambda q, k: FORMS[form](q, k, v, tokens, tokens, mask=Causal(), scale=0.3))
    for given, first, last in (
        ((q, k.at[:, 5].set(jnp.nan)), 5, T),
        ((q, k.at[:, 5].set(jnp.inf)), 5, T),
        ((q.at[:, 5].set(jnp.nan), k), 5, 6),
    ):
        for found in run(*given):
            broken = np.isnan(found).reshape(T, -1).all(axis=1)
            assert broken[first:last].all() and np.isfinite(np.delete(found[0], np.s_[first:last], axis=0)).all()
