"""The short convolution against its definition, token by token, and its answer to padding inside a document."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import PADDING, Batch, causal_info
from lcx.mixers.mixer import Inherited
from lcx.mixers.short_convolution import ShortConvolution
from lcx.parallel.rules import Rules
from lcx.positions.rope import Rope

WIDTH, TAPS = 3, 3


def run(segments, state=False):
    """(output, x, kernel) of one row whose documents count their own tokens; with a state if asked."""
    inherited = Inherited(width=WIDTH, depth=1, rope=Rope(), compute="float32", rules=Rules())
    module = ShortConvolution(taps=TAPS).build(inherited, rngs=nnx.Rngs(0))
    index = [sum(s == segment for s in segments[:t]) for t, segment in enumerate(segments)]
    segments = jnp.asarray([segments], jnp.int32)
    x = np.random.default_rng(0).normal(size=(1, segments.shape[1], WIDTH)).astype(np.float32)
    batch = Batch(tokens=jnp.zeros_like(segments), info=dataclasses.replace(causal_info(segments), index=jnp.asarray([index])))
    y, _, _ = module(jnp.asarray(x), batch, module.init_state(1, 16) if state else None)
    return np.asarray(y)[0], x[0], np.asarray(module.kernel[...])


def defined(segments, x, kernel):
    """Each token reads the tokens before it in its document, padding skipped."""
    y = np.zeros_like(x)
    for t, segment in enumerate(segments):
        earlier = [s for s in range(t) if segments[s] == segment][::-1] if segment != PADDING else []
        for k, s in enumerate(earlier[:TAPS]):
            y[t] += kernel[k] * x[s]
    return y


def test_padding_between_documents():
    segments = [0, 0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 0]
    y, x, kernel = run(segments)
    np.testing.assert_allclose(y, defined(segments, x, kernel), atol=1e-6)


@pytest.mark.parametrize("between", [0, 3])
def test_padding_or_a_document_inside_another_is_not_answered(between):
    segments = [1, 1, between, 1, 1, 2]
    y, x, kernel = run(segments)
    expected = defined(segments, x, kernel)
    assert np.isnan(y[3:]).all()
    np.testing.assert_allclose(y[:3], expected[:3], atol=1e-6)


def test_with_a_state_padding_may_stand_anywhere():
    segments = [1, 1, 0, 1, 1, 0, 0, 1, 2]
    y, x, kernel = run(segments, state=True)
    np.testing.assert_allclose(y, defined(segments, x, kernel), atol=1e-6)
