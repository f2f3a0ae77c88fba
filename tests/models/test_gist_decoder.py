"""What is behind gist tokens knows of the prompt by them alone, in whole rows, chunks, steps and from gists that were kept."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import tokens_of
from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.inference.generate import generate
from lcx.memory.gist import AFTER, BEFORE, GIST, Gist
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.spec import SpecError

VOCAB, T, MARK = 12, 12, 9
LAYER = Layer(mixer=Attention(heads=4, kv_heads=2, head_dim=4), channel=GLU(hidden=8))
PLAIN = Decoder(vocab=VOCAB, width=8, pattern=(LAYER,), periods=2, embed_mixer=ShortConvolution(taps=3))
TEXT = [1, 2, 3, 4, MARK, MARK, 5, 6, 7, 8, 1, 2]


def built(control="gist", **changes):
    return dataclasses.replace(PLAIN, memory=Gist(token=MARK, control=control), **changes).build(rngs=nnx.Rngs(0))


@jax.jit
def run(model, tokens, segments, state=None, start=None):
    return model(Batch(tokens=tokens, info=causal_info(segments, start)), state)[:2]


def rows(*texts):
    return jnp.asarray(texts, jnp.int32)


def ones(n=T, count=2):
    return np.ones((count, n), np.int32)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=4e-6, atol=4e-6)


def test_the_authors_masks():
    with np.load(Path(__file__).parents[1] / "oracles" / "golden" / "gist.npz") as file:
        held = dict(file)
    tokens = held["tokens"]
    segments = (tokens != 0).astype(np.int32)
    for control in ("gist", "negative", "positive"):
        model = built(control)
        batch = Batch(tokens=jnp.asarray(tokens, jnp.int32), info=causal_info(segments))
        gist, after, _, twice = model._told(batch, None)
        assert not np.any(twice)
        roles = jnp.where(gist, GIST, jnp.where(after, AFTER, BEFORE))
        info = tokens_of(dataclasses.replace(batch.info, roles=roles))
        seen = model.slots[0].mixer.mask.visible(info.rows(), info.columns())
        wanted = held[f"mask/{control}"] & np.tril(np.ones(seen.shape[1:], bool)) & (segments[:, :, None] > 0)
        assert np.array_equal(seen, wanted)


@pytest.mark.parametrize("control", ["gist", "negative", "positive"])
def test_what_is_seen(control):
    model, text = built(control), rows(TEXT, TEXT)
    before = run(model, text, ones())[0]
    for at, token, places in ((0, 3, range(6, 12)), (3, 0, range(6, 12)), (7, 3, range(8, 12))):
        after = run(model, text.at[:, at].set(token), ones())[0]
        assert np.array_equal(before[:, :at], after[:, :at])
        moved = np.abs(after - before).max(axis=(0, 2))[list(places)] > 0
        reaches = control != "negative" or at == 7
        assert moved.all() if reaches else not moved.any()


def test_nothing_of_the_prompt_is_left_but_its_gists():
    """The keys and values of two gists of another prompt in the state: what follows is the same, bit for bit."""
    model = built()
    prompts = rows(TEXT[:6], [8, 8, 1, 0, MARK, MARK])
    _, state = run(model, prompts, ones(6), model.init_state(2, T))
    same = lambda x: x.at[:, 1, 4:6].set(x[:, 0, 4:6]) if x.ndim == 5 else x
    held = state.decoder["layers"]
    decoder = {**state.decoder, "layers": jax.tree.map(same, held)}
    assert np.any(np.asarray(held[0].k)[:, 0, :4] != np.asarray(held[0].k)[:, 1, :4])
    y, _ = run(model, rows(TEXT[6:], TEXT[6:]), ones(6), dataclasses.replace(state, decoder=decoder), np.asarray([6, 6]))
    np.testing.assert_array_equal(y[0], y[1])


@pytest.mark.parametrize("control", ["gist", pytest.param("negative", marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunks", [[1] * T, [5, 3, 4], [3, 9]], ids=str)
def test_chunks_and_steps_equal_one_pass(control, chunks):
    model, text = built(control), rows(TEXT, [1, MARK, 3, 4, 2, 2, 5, 6, 7, 8, 1, 2])
    state, found, at = model.init_state(2, T), [], 0
    for size in chunks:
        y, state = run(model, text[:, at : at + size], ones(size), state, np.asarray([at, at]))
        found.append(y)
        at += size
    close(jnp.concatenate(found, axis=1), run(model, text, ones())[0])


def test_documents_know_nothing_of_each_other():
    model = built()
    text, segments = (
        rows([*TEXT, 3, 4, MARK, 5], [0] * 2 + TEXT + [3, 4]),
        np.asarray([[1] * 12 + [2] * 4, [0, 0] + [1] * 12 + [2, 2]]),
    )
    packed = run(model, text, segments)[0]
    alone = run(model, rows(TEXT, TEXT), ones())[0]
    close(packed[0, :12], alone[0])
    close(packed[1, 2:14], alone[0])
    close(packed[0, 12:], run(model, rows([3, 4, MARK, 5], [3, 4, MARK, 5]), ones(4))[0][0])
    close(packed[1, 14:], run(model, rows([3, 4], [3, 4]), ones(2))[0][0])
    state = model.init_state(2, 16)
    y, state = run(model, text[:, :13], segments[:, :13], state, np.asarray([0, 0]))
    z, _ = run(model, text[:, 13:], segments[:, 13:], state, np.asarray([1, 11]))
    close(jnp.concatenate([y, z], axis=1)[:, 2:], packed[:, 2:])


def test_gists_alone_go_on_as_if_the_prompt_were_there():
    model = built()
    prompts = rows(TEXT[:6], [MARK, 1, 2, 3, 4, MARK])
    prompts = prompts.at[1, 0].set(7)
    _, state = run(model, prompts, ones(6), model.init_state(2, T))
    small = model.compressed(state, gists=2, room=6)
    assert small.decoder["layers"][0].k.shape[2] == 8 and small.decoder["layers"][0].used.tolist() == [[2, 1]] * 2
    rest = rows(TEXT[6:], TEXT[6:])
    found, after = run(model, rest[:, :4], ones(4), small, np.asarray([6, 6]))
    wanted, whole = run(model, rest[:, :4], ones(4), state, np.asarray([6, 6]))
    close(found, wanted)
    step = lambda state, token=rest[:, 4:5]: run(model, token, ones(1), state, np.asarray([10, 10]))[0]
    close(step(after), step(whole))
    assert np.isnan(step(after, rows([MARK], [MARK]))).all()  # it would have to see the prompt
    assert np.isnan(step(model.compressed(whole, gists=2, room=6))).all()  # tokens behind the gists are gone
    with pytest.raises(ValueError, match="control = 'positive'"):
        built("positive").compressed(state, gists=2, room=6)


def test_what_cannot_be_answered_stays_so():
    model = built()
    y, _ = run(model, rows([1, MARK, 3, MARK, 4, 5], [1, 2, 3, 4, 5, 6]), ones(6))
    assert np.isfinite(y[0, :3]).all() and np.isnan(y[0, 3:]).all() and np.isfinite(y[1]).all()
    _, state = run(model, rows([1, MARK, 3], [1, 2, 3]), ones(3), model.init_state(2, T))
    again, state = run(model, rows([MARK, 4], [4, 5]), ones(2), state, np.asarray([3, 3]))
    assert np.isnan(again[0]).all() and np.isfinite(again[1]).all()
    small = model.compressed(state, gists=2, room=4)
    assert np.isnan(run(model, rows([4], [6]), ones(1), small, np.asarray([5, 5]))[0]).all()  # a second run; no gist at all


def test_rows_generate_as_they_do_alone():
    model = built()
    prompts = [TEXT[:8], [5, 4, 3], [1, 2, MARK]]
    for prompt, made in zip(prompts, generate(model, prompts, max_new=3, chunk=3), strict=True):
        tokens = [*prompt, *made.ids]
        hidden = run(model, rows(tokens[:-1], tokens[:-1]), ones(len(tokens) - 1))[0][0]
        chosen = np.argmax(model.logits(hidden), axis=-1)[len(prompt) - 1 :]
        assert MARK not in made.ids and chosen.tolist() == made.ids


def test_a_token_that_is_none_is_refused():
    with pytest.raises(SpecError, match=r"Gist\.token = 12: expected a token below vocab = 12"):
        dataclasses.replace(PLAIN, memory=Gist(token=12)).build(rngs=nnx.Rngs(0))
