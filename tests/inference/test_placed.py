"""Generation after prompts with positions of their own: steps equal one pass in which new text stands behind them."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.channels.glu import GLU
from lcx.inference.forward import token_logprobs
from lcx.inference.generate import generate
from lcx.inference.placed import behind, padded_positions
from lcx.mixers.attention import Attention
from lcx.mixers.transformer_xl import TransformerXL
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.positions.hope import HoPE
from lcx.positions.rerope import ReRoPE
from lcx.positions.rope import Rope
from lcx.positions.visual import DiagonalPositions, Grid, MRopePositions, Placed, Text, V2PEPositions
from lcx.spec import edits

CACHE = "pattern[0].mixer.cache"
PARTS = [[Text(2), Grid(2, 2, 2), Text(1)], [Text(3)]]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7]]
RULES = {
    "m-rope": (Rope(sections=(2, 1, 1)), MRopePositions(), "rotated"),
    "hope": (HoPE(sections=(2, 1, 1)), DiagonalPositions(gammas=(0.75,)), "raw"),
    "v2pe": (Rope(), V2PEPositions(strides=(64,)), "rotated"),
}


def decoder(rope, keys) -> Decoder:
    mixer = Attention(heads=2, kv_heads=1, head_dim=8, cache=DenseCache(keys=keys))
    return Decoder(vocab=32, width=16, pattern=(Layer(mixer=mixer, channel=GLU(hidden=16)),), periods=1, rope=rope)


@jax.jit
def logits_of(model, batch):
    return model.logits(model(batch)[0])


@pytest.mark.parametrize("name", RULES)
def test_steps_equal_one_pass(name):
    rope, rule, keys = RULES[name]
    model = decoder(rope, keys).build(rngs=nnx.Rngs(0))
    placed = [rule.place(parts) for parts in PARTS]
    for prompt, own, row in zip(PROMPTS, placed, generate(model, PROMPTS, max_new=3, chunk=4, placed=placed), strict=True):
        whole = np.asarray([[*prompt, *row.ids]], np.int32)
        info = causal_info(np.ones_like(whole))
        positions = np.concatenate([own.positions, own.extended(3)])[None].astype(np.float32)
        batch = Batch(tokens=whole, info=dataclasses.replace(info, positions=positions))
        best = logits_of(model, batch)[0].argmax(axis=-1)
        assert row.ids == best[len(prompt) - 1 : -1].tolist()


def test_log_probabilities_of_rows_with_positions():
    rope, rule, keys = RULES["m-rope"]
    model, tokens = decoder(rope, keys).build(rngs=nnx.Rngs(0)), np.asarray(PROMPTS[:1], np.int32)
    placed = [rule.place(PARTS[0])]
    ones, positions = np.ones_like(tokens), padded_positions(model.spec, PROMPTS[:1], placed, tokens.shape[1], 1)
    batch = Batch(tokens=tokens, info=dataclasses.replace(causal_info(ones), positions=positions))
    wanted = jax.nn.log_softmax(logits_of(model, batch))[0, np.arange(10), tokens[0, 1:]]
    found, _ = token_logprobs(model, tokens, ones, positions)
    np.testing.assert_allclose(found[0, :-1], wanted, atol=1e-5)
    assert np.abs(np.asarray(token_logprobs(model, tokens, ones)[0])[0, :-1] - wanted).max() > 1e-3


def test_a_document_is_cut_within_its_last_text():
    whole = MRopePositions().place([Text(2), Grid(1, 2, 2), Text(3)])
    cut = whole.cut(7)
    np.testing.assert_array_equal(cut.positions, whole.positions[:7])
    assert cut.following == whole.positions[7, 0] and whole.cut(9) is whole
    with pytest.raises(ValueError, match=r"tokens = 4: expected a place from which on all tokens are text"):
        whole.cut(4)


def test_positions_of_other_prompts_are_refused():
    model = decoder(Rope(), "rotated").build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"placed of \[\(2, 1\)\]: expected a position for each of \[3\] tokens"):
        generate(model, [[1, 2, 3]], max_new=1, placed=[V2PEPositions().place([Text(2)])])
    far = Placed(np.zeros((1, 1)), 2.0**24 - 2)
    with pytest.raises(ValueError, match=r"placed.following = 16777214.0 and max_new = 3: expected new tokens up to 2\^24"):
        generate(model, [[1]], max_new=3, placed=[far])


@pytest.mark.parametrize(
    "changes, axes, message",
    [
        (
            [("pattern[0].mixer.distances", ReRoPE(window=4))],
            1,
            r"expected None, as model.pattern\[0\].mixer.distances turns pairs",
        ),
        (
            [("embed_mixer", TransformerXL(attention=Attention(heads=2, kv_heads=1, head_dim=8, rope="none")))],
            1,
            "expected None, as model.embed_mixer, a TransformerXL, reads places by their index",
        ),
        ([(CACHE, KVCache(keys="raw", positions="slots"))], 1, "expected None, as .*cache says by index where tokens stand"),
        ([(CACHE, KVCache(policy=Evict(score=ExpectedAttention(), keep=8)))], 1, "cache says by index where tokens stand"),
        ([("rope", None)], 1, "expected None, as no layer of the model has a rope"),
        ([], 3, r"placed of 3 axes: expected 1, which the rope of model.pattern\[0\].mixer reads"),
        ([("rope", Rope(sections=(2, 1, 1)))], 2, "placed of 2 axes: expected 1 or 3"),
    ],
)
def test_positions_that_no_layer_reads_are_refused(changes, axes, message):
    model = edits(decoder(Rope(), "rotated"), changes).build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], max_new=1, placed=[Placed(np.zeros((2, axes)), 1.0)])


def test_new_text_keeps_the_fraction_of_its_place():
    """What follows 70,000 tokens at 602.7 stands at 602.7, which 602.7 - 70,000 in float32 would lose."""
    far = Placed(np.linspace(0, 602, 70_000)[:, None], 602.7)
    following, since = behind([far], 2, 1)
    assert following.tolist() == [np.float32(602.7), 0] and since.tolist() == [70_000, 0]
