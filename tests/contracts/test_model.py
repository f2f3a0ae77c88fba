"""Whole decoders keep the mixers' contract: any chunks, packed or alone, padded or not, and nothing from the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Sink, Window
from lcx.batch import Batch, TokenInfo, causal_info
from lcx.cache.dense import DenseCache
from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.models.residual import DeepNorm, Parallel, Sandwich
from lcx.norms import LayerNorm, RMSNorm
from lcx.positions.yarn import YaRN

VOCAB, LENGTH = 32, 13
CHANNEL = GLU(hidden=24)
WINDOW = Attention(
    heads=2, kv_heads=1, head_dim=8, mask=Sink(size=1) | Window(size=4), sinks="learned", cache=DenseCache(keys="raw")
)
DECODERS = {
    "plain": Decoder(
        vocab=VOCAB,
        width=16,
        pattern=(
            Layer(mixer=Attention(heads=4, kv_heads=2, head_dim=8), channel=CHANNEL),
            Layer(mixer=WINDOW, channel=CHANNEL),
        ),
        periods=2,
        embed_mixer=ShortConvolution(taps=2),
    ),
    "unusual": Decoder(
        vocab=VOCAB,
        width=16,
        pattern=(
            Layer(mixer=ShortConvolution(taps=3), channel=CHANNEL, residual=Sandwich(), norm=LayerNorm()),
            Layer(mixer=WINDOW, channel=CHANNEL, residual=Parallel()),
            Layer(
                mixer=Attention(heads=2, kv_heads=2, head_dim=8, qk_norm=RMSNorm(), bias="all", softcap=5.0),
                channel=CHANNEL,
                residual=DeepNorm(alpha=1.4),
            ),
        ),
        periods=1,
        rope=YaRN(factor=4.0, original_length=16),
        head="untied",
        logit_softcap=10.0,
    ),
}
# Two documents after left padding; one between paddings.
PACKED = np.asarray([[0] * 2 + [1] * 5 + [2] * 6, [0] * 3 + [1] * 7 + [0] * 3])
REAL = PACKED != 0


@pytest.fixture(scope="module", params=DECODERS.values(), ids=DECODERS)
def decoder(request):
    model = request.param.build(rngs=nnx.Rngs(0))

    @jax.jit
    def run(model, tokens, info, state):
        hidden, state, _ = model(Batch(tokens=tokens, info=info), state)
        return model.logits(hidden), state

    return model, lambda tokens, info, state=None: run(model, jnp.asarray(tokens), info, state)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, PACKED.shape).astype(np.int32)


def whole(run, segments, ids) -> np.ndarray:
    return np.asarray(run(ids, causal_info(segments))[0])


@pytest.mark.parametrize("chunks", [[6, 1, 6], [1] * LENGTH], ids=["chunks", "steps"])
def test_chunks_and_steps_equal_the_parallel_form(decoder, chunks):
    model, run = decoder
    info, ids, made, at = causal_info(PACKED), tokens(), [], 0
    state = model.init_state(2, int(REAL.sum(axis=1).max()))
    for size in chunks:
        part = slice(at, at + size)
        logits, state = run(ids[:, part], info.take(part), state)
        made.append(logits)
        at += size
    np.testing.assert_allclose(np.concatenate(made, axis=1)[REAL], whole(run, PACKED, ids)[REAL], atol=5e-6)


def test_packed_equals_separate_and_padding_changes_nothing(decoder):
    _, run = decoder
    ids, alone, segments = tokens(), tokens(seed=1), np.zeros_like(PACKED)
    packed = whole(run, PACKED, ids)
    alone[0, :5], segments[0, :5] = ids[0, 2:7], 1
    alone[1, 7:], segments[1, 7:] = ids[0, 7:], 4
    separate = whole(run, segments, alone)
    np.testing.assert_allclose(packed[0, 2:7], separate[0, :5], atol=5e-6)
    np.testing.assert_allclose(packed[0, 7:], separate[1, 7:], atol=5e-6)
    noise = np.where(REAL, ids, tokens(seed=2))
    np.testing.assert_array_equal(packed[REAL], whole(run, PACKED, noise)[REAL])


@pytest.mark.parametrize("t", [5, 9])
def test_the_future_and_other_documents_are_not_seen(decoder, t):
    _, run = decoder
    ids, others = tokens(), tokens()
    others[0, t] = (others[0, t] + 1) % VOCAB
    before, after = whole(run, PACKED, ids), whole(run, PACKED, others)
    changed = np.abs(before - after).max(axis=-1) > 0
    assert changed[0, t] and not changed[1].any()
    assert not changed[0, 2:t].any() and (t > 6 or not changed[0, 7:].any())


def test_row_order_in_the_array_does_not_matter_to_attention():
    """Everything that a token is stands in its TokenInfo, so a permuted row gives permuted outputs."""
    layer = Layer(mixer=WINDOW, channel=CHANNEL)
    model = Decoder(vocab=VOCAB, width=16, pattern=(layer,), periods=2).build(rngs=nnx.Rngs(0))
    info, ids = causal_info(PACKED), tokens()
    order = np.random.default_rng(0).permutation(LENGTH)
    permuted: TokenInfo = jax.tree.map(lambda leaf: leaf[:, order], info)
    run = jax.jit(lambda model, ids, info: model(Batch(tokens=ids, info=info))[0])
    expected = np.asarray(run(model, ids, info))[:, order]
    np.testing.assert_allclose(
        np.asarray(run(model, ids[:, order], permuted))[REAL[:, order]], expected[REAL[:, order]], atol=5e-6
    )
