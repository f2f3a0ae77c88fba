"""Entropy of attention against numbers by hand, and of a model against float64 softmax."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Causal, Window
from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.evaluation.attention_entropy import entropies, entropy, slope
from lcx.evaluation.raw_heads import raw_heads
from lcx.mixers.attention import Attention
from lcx.mixers.transformer_xl import TransformerXL
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.positions.query_scale import LogN

T = 12


def decoder(**mixer) -> Decoder:
    layer = Layer(mixer=Attention(heads=4, kv_heads=2, head_dim=8, **mixer), channel=GLU(hidden=16))
    return Decoder(vocab=32, width=16, pattern=(layer,), periods=2)


def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 32, (3, T)).astype(np.int32)
    return Batch(tokens=tokens, info=causal_info(np.ones_like(tokens)))


def test_two_tokens_a_quarter_and_three():
    """Scores ln 1 and ln 3: H = ln 4 - 3/4 ln 3. A first token has one key: 0. Documents of a row and padding are apart."""
    q, k = jnp.ones((1, 5, 1, 1)), jnp.asarray([0.0, np.log(3) * 2, 7.0, 7.0, 5.0])[None, :, None, None]
    info = causal_info(np.asarray([[1, 1, 2, 2, 0]]))
    found = entropy(q, k, info, mask=Causal(), scale=0.5)[0, :, 0]
    np.testing.assert_allclose(found, [0, np.log(4) - 0.75 * np.log(3), 0, np.log(2), 0], atol=1e-6)


@pytest.mark.slow
def test_queries_that_look_at_all_alike():
    """ln n at each place, which grows by 1 with ln n; ln 3 where a window holds three."""
    seen = np.arange(1, T + 1)
    for mask, wanted in ((Causal(), seen), (Window(size=3), np.minimum(seen, 3))):
        model = decoder(mask=mask).build(rngs=nnx.Rngs(0))
        model.slots[0].mixer.query[...] *= 0
        found = np.asarray(entropies(model, batch()))
        np.testing.assert_allclose(found, np.log([wanted, wanted]), atol=1e-5)
        np.testing.assert_allclose(slope(found, 4, T), 1 if mask == Causal() else 0, atol=1e-5)


def test_a_model_against_float64():
    model = decoder(query_scale=LogN(original_length=4, skip_layers=1)).build(rngs=nnx.Rngs(0))
    found = entropies(model, batch())
    theta, places = 1e4 ** -(np.arange(4) / 4), np.arange(T)
    for layer in range(2):
        q, k = (np.asarray(x, np.float64) for x in raw_heads(model, batch(), layer))
        q, k = (x[..., :4] + 1j * x[..., 4:] for x in (q, k))
        q, k = (x * np.exp(1j * places[:, None, None] * theta) for x in (q, np.repeat(k, 2, axis=2)))
        scores = np.einsum("bthc,bshc->bhts", q, k.conj()).real * 8**-0.5
        scores *= np.maximum(1, np.log(places + 1) / np.log(4))[:, None] if layer else 1
        scores = np.where(places[:, None] >= places, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        by_hand = -(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean(axis=(0, 1))
        np.testing.assert_allclose(found[layer], by_hand, atol=1e-5)


def test_a_layer_that_is_more_than_plain_attention_has_no_raw_heads():
    attention = Attention(heads=4, kv_heads=2, head_dim=8, rope="none")
    model = Decoder(
        vocab=32, width=16, pattern=(Layer(mixer=TransformerXL(attention=attention), channel=GLU(hidden=16)),), periods=1
    )
    with pytest.raises(ValueError, match="raw_heads: layer = 0: expected pre-norm attention"):
        raw_heads(model.build(rngs=nnx.Rngs(0)), batch(), 0)


def test_scores_that_are_more_than_queries_times_keys_are_refused():
    for more, name in (({"softcap": 5.0}, "softcap"), ({"sinks": "learned"}, "learned sinks")):
        with pytest.raises(ValueError, match=f"attention_entropy: {name}: expected scores"):
            entropies(decoder(**more).build(rngs=nnx.Rngs(0)), batch())
