"""Documents counted through; an anchor before all of them is the same as one of their own before each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.data.continuous import Continuous
from lcx.data.packing import PackedText
from lcx.data.rows import collate
from lcx.data.sources import StandardLibrary
from lcx.data.tokenizers import ByteTokenizer
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.spec import SpecError

BYTES, TEXT = ByteTokenizer(), PackedText(source=StandardLibrary(split="heldout"))


def model():
    layer = Layer(mixer=Attention(heads=2, kv_heads=1, head_dim=8), channel=GLU(hidden=24))
    return Decoder(vocab=264, width=16, pattern=(layer,), periods=2).build(rngs=nnx.Rngs(0))


@jax.jit
def hidden(model, batch):
    return model(batch)[0]


def several(sees, length=200):
    """A row of several documents."""
    rows = Continuous(rows_of=TEXT, sees=sees).rows(BYTES, length, 0)
    return next(row for row in (rows[i] for i in range(len(rows))) if len(set(row.segments)) >= (2 if sees == "anchor" else 1))


@pytest.mark.parametrize("sees", ["own document", "whole row", "anchor"])
def test_positions_are_counted_through(sees):
    plain, found = TEXT.rows(BYTES, 200, 0), Continuous(rows_of=TEXT, sees=sees).rows(BYTES, 200, 0)
    for i in range(5):
        row = found[i]
        np.testing.assert_array_equal(row.positions[row.segments != 0, 0], np.arange((row.segments != 0).sum()))
        if sees == "anchor":
            assert (row.tokens[0], row.segments[0], row.weights[0]) == (BYTES.bos, -1, 0) and (row.segments[1:] != -1).all()
            continue
        np.testing.assert_array_equal(row.tokens, plain[i].tokens)
        np.testing.assert_array_equal(row.segments, plain[i].segments if sees == "own document" else plain[i].segments != 0)


def test_an_anchor_is_one_of_each_documents_own():
    """The form for kernels of documents: each begins with a bos of its own at position 0, others keep their places."""
    lengths, net = (7, 12, 5), model()
    tokens = np.random.default_rng(0).integers(0, 256, sum(lengths)).astype(np.int32)
    segments = np.repeat(np.arange(1, 4), lengths)
    places = np.arange(1, 1 + sum(lengths))

    def batch(tokens, segments, positions):
        info = causal_info(np.asarray(segments)[None])
        positions = np.asarray(positions, np.float32)[None, :, None]
        return Batch(tokens=np.asarray(tokens, np.int32)[None], info=dataclasses.replace(info, positions=positions))

    anchored = hidden(net, batch([BYTES.bos, *tokens], [-1, *segments], [0, *places]))[0, 1:]
    own = [np.concatenate([[front], field[segments == n]]) for n in (1, 2, 3) for front, field in ((BYTES.bos, tokens),)]
    own_places = [np.concatenate([[0], places[segments == n]]) for n in (1, 2, 3)]
    own_segments = [np.full(1 + n, i) for i, n in enumerate(lengths, 1)]
    apart = hidden(net, batch(np.concatenate(own), np.concatenate(own_segments), np.concatenate(own_places)))[0]
    starts = np.cumsum([0, *(1 + n for n in lengths[:-1])])
    apart = np.delete(np.asarray(apart), starts, axis=0)
    np.testing.assert_allclose(anchored, apart, atol=1e-5)
    plain = hidden(net, batch(tokens, segments, places))[0]
    assert jnp.abs(plain - anchored).max() > 1e-2


def test_the_pipeline_keeps_the_anchor():
    row = several("anchor")
    info = collate([row]).info
    assert info.segments[0, 0] == -1 and info.index[0, 0] == 0 and info.index[0, 1] == 0 and info.positions[0, 1, 0] == 1


def test_a_tokenizer_without_bos_is_refused():
    class Mute(ByteTokenizer):
        bos = property()

    with pytest.raises(SpecError, match=r"sees = 'anchor': expected another than 'anchor': the tokenizer has no bos"):
        Continuous(rows_of=TEXT).rows(Mute(), 64, 0)
