"""Ropes that depend on the length of a document: what a length is, in rows, in generation and in the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info, document_lengths
from lcx.cache.dense import DenseCache
from lcx.channels.glu import GLU
from lcx.inference.generate import generate
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.length_rule import length_policy
from lcx.positions.longrope import LongRoPE
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.spec import SpecError

FROZEN = DynamicNTK(original_length=6, factor=2.0)
SWITCH = LongRoPE(original_length=10, short=(1.0,) * 4, long=(1.0, 2.0, 3.0, 4.0), factor=4.0)
KEPT = dataclasses.replace(SWITCH, kept_positions=4)


def decoder(rope=FROZEN, depth=2) -> Decoder:
    mixer = Attention(heads=2, kv_heads=1, head_dim=8, cache=DenseCache(keys="raw"))
    return Decoder(vocab=32, width=16, pattern=(Layer(mixer=mixer, channel=GLU(hidden=16)),), periods=depth, rope=rope)


def logits_of(model, rows):
    """Of right-padded rows in one pass; of one length, as compiling is what takes time."""
    longest = 16
    tokens = np.asarray([[*row, *[0] * (longest - len(row))] for row in rows], np.int32)
    segments = np.asarray([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int32)
    return _logits(model, Batch(tokens=tokens, info=causal_info(segments)))


@jax.jit
def _logits(model, batch):
    return model.logits(model(batch)[0])


def test_a_length_is_that_of_the_own_document():
    segments = np.asarray([[2, 2, 1, 2, 0, 1, 0], [3, 3, 3, 3, 3, 3, 3]])
    assert document_lengths(causal_info(segments)).tolist() == [[3, 3, 2, 3, 0, 2, 0], [7] * 7]
    assert document_lengths(causal_info(segments[1:], start=np.asarray([5]))).tolist() == [[12] * 7]


@pytest.mark.parametrize("rope", [FROZEN, SWITCH, KEPT], ids=["dynamic ntk", "longrope", "longrope, kept"])
def test_a_document_is_turned_as_it_is_alone(rope):
    """Packed beside others and padded: each document of a row has the frequencies of its own length."""
    model = decoder(rope).build(rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 32, 24).astype(np.int32)
    parts = (tokens[:5], tokens[5:17], tokens[17:24])
    packed = Batch(
        tokens=np.concatenate([[0], tokens])[None],
        info=causal_info(np.asarray([[0] + [1] * 5 + [2] * 12 + [3] * 7])),
    )
    found = _logits(model, packed)[0, 1:]
    wanted = jnp.concatenate([logits_of(model, [part])[0, : len(part)] for part in parts])
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("rope", [FROZEN, SWITCH, KEPT], ids=["dynamic ntk", "longrope", "longrope, kept"])
def test_frozen_generation_equals_one_pass_over_the_whole_request(rope):
    """Prompts on both sides of the window, decoded together; a request's length is its prompt and all that may follow."""
    model = decoder(rope).build(rngs=nnx.Rngs(0))
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8]]
    for prompt, row in zip(prompts, generate(model, prompts, max_new=4, chunk=2), strict=True):
        whole = [*prompt, *row.ids]
        assert len(whole) == len(prompt) + 4
        best = logits_of(model, [whole])[0].argmax(axis=-1)
        assert row.ids == best[len(prompt) - 1 : len(whole) - 1].tolist()


def test_first_positions_keep_their_angles():
    """Documents of 16 tokens, beyond the window, and of 8; positions of the last are moved, and only those below 4 are kept."""
    x = np.random.default_rng(0).normal(size=(3, 16, 1, 8))
    positions, lengths = np.stack([np.arange(16.0)] * 2 + [np.arange(16.0) * 1000]), np.asarray([[16], [8], [16]])
    found = rotate(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(positions[..., None], jnp.float32),
        KEPT.frequencies(8, 16),
        jnp.asarray(np.broadcast_to(lengths, (3, 16))),
    )
    theta = 1e4 ** -(np.arange(4) / 4)
    for b, t in np.ndindex(3, 16):
        rates = theta / np.asarray([1.0, 2.0, 3.0, 4.0]) if lengths[b, 0] > 10 else theta
        kept = positions[b, t] < 4
        angle, factor = positions[b, t] * (theta if kept else rates), 1 if kept else np.sqrt(1 + np.log(4) / np.log(10))
        turned = (x[b, t, 0, :4] + 1j * x[b, t, 0, 4:]) * np.exp(1j * angle) * factor
        np.testing.assert_allclose(found[b, t, 0], np.concatenate([turned.real, turned.imag]), atol=2e-5)


@pytest.mark.slow
def test_first_positions_keep_their_angles_on_a_mesh():
    model = decoder(KEPT).build(rngs=nnx.Rngs(0))
    rows = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [1, 5, 9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8]]
    wanted = logits_of(model, rows)
    with jax.set_mesh(MeshSpec(data=2, context=4).build()):
        found = logits_of(model, rows)
    for row, one, other in zip(rows, found, wanted, strict=True):
        np.testing.assert_allclose(one[: len(row)], other[: len(row)], atol=2e-5)


def test_kept_positions_that_make_no_sense_are_refused():
    with pytest.raises(SpecError, match=r"LongRoPE\.kept_positions = -1: expected at least 0"):
        dataclasses.replace(SWITCH, kept_positions=-1)
    with pytest.raises(SpecError, match="kept_positions = 4: expected 0 beside sections"):
        dataclasses.replace(KEPT, sections=(2, 2))


def test_growing_keys_are_those_of_the_length_so_far():
    """One layer: after every token its logits are those of a pass over what was read; frozen ones differ."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    for policy, equal in (("growing", True), ("frozen", False)):
        model = decoder(dataclasses.replace(FROZEN, length_policy=policy), depth=1).build(rngs=nnx.Rngs(0))
        (row,) = generate(model, [prompt], max_new=5, chunk=4)
        found = []
        for n in range(5):
            logits = jax.nn.log_softmax(logits_of(model, [[*prompt, *row.ids[:n]]])[0, len(prompt) + n - 1])
            found.append(abs(float(logits[row.ids[n]]) - row.logprobs[n]) < 1e-5)
        assert all(found) == equal


def test_a_state_needs_to_be_told_lengths():
    model = decoder().build(rngs=nnx.Rngs(0))
    batch = Batch(tokens=np.zeros((1, 2), np.int32), info=causal_info(np.ones((1, 2), np.int32)))
    with pytest.raises(ValueError, match=r"info\.lengths: None, but this rope depends on the length of a document"):
        model(batch, model.init_state(1, 8))


def test_rotated_keys_are_refused():
    mixer = Attention(heads=2, kv_heads=1, head_dim=8)
    model = Decoder(vocab=32, width=16, pattern=(Layer(mixer=mixer, channel=GLU(hidden=16)),), periods=1, rope=FROZEN)
    built = model.build(rngs=nnx.Rngs(0))
    info = causal_info(np.ones((1, 2), np.int32), lengths=jnp.full((1, 2), 9))
    with pytest.raises(ValueError, match=r"cache\.keys = 'rotated': expected 'raw'"):
        built(Batch(tokens=np.zeros((1, 2), np.int32), info=info), built.init_state(1, 8))


def test_one_policy_a_model():
    assert length_policy(decoder(Rope())) is None
    assert length_policy(decoder()) == "frozen"
    model = decoder(dataclasses.replace(FROZEN, length_policy="growing"))
    slot = dataclasses.replace(model.pattern[0], mixer=dataclasses.replace(model.pattern[0].mixer, rope=SWITCH))
    with pytest.raises(SpecError, match="length_policy = frozen and growing in one model"):
        length_policy(dataclasses.replace(model, pattern=(*model.pattern, slot)))


def test_far_angles_of_every_length_are_right():
    rule = DynamicNTK(original_length=8192, step=1 << 20)
    table = rule.frequencies(64, 1 << 24)
    positions, lengths = (
        np.asarray([[0, 8000, 1 << 20, 4_000_000, (1 << 24) - 1]]),
        np.asarray([[8192, 8193, 1 << 21, 5_000_000, 1 << 24]]),
    )
    x = np.zeros((1, 5, 1, 64), np.float32)
    x[..., :32] = 1
    found = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions[..., None], jnp.float32), table, jnp.asarray(lengths)))
    for t in range(5):
        angle = positions[0, t] * table.at(int(lengths[0, t])).inv_freq
        np.testing.assert_allclose(found[0, t, 0], np.concatenate([np.cos(angle), np.sin(angle)]), atol=1e-3)
