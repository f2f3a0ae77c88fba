"""A decoder that reads by segments: equal to calls of a plain one, whatever is packed, padded, chunked or generated."""

import dataclasses

import by_segments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.inference.generate import generate
from lcx.memory.auto_compressor import AutoCompressor
from lcx.memory.hmt import HMT
from lcx.memory.icae import ICAE
from lcx.memory.rmt import RMT
from lcx.memory.segment_memory import SegmentMemory, pushed
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.mixers.neural_memory import NeuralMemory
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.objectives.random_segments import RandomSegments
from lcx.parallel.mesh import MeshSpec
from lcx.parts import parts

VOCAB, T, WIDE = 12, 10, 14
LAYER = Layer(mixer=Attention(heads=2, kv_heads=2, head_dim=4), channel=GLU(hidden=8))
PLAIN = Decoder(vocab=VOCAB, width=8, pattern=(LAYER,), periods=2, documents=3)
MEMORIES = [spec for cls in parts(SegmentMemory) for spec in cls.examples()]
names = lambda spec: f"{type(spec).__name__}-{spec == type(spec).examples()[0]}"
FEW = [spec for spec in MEMORIES if spec == type(spec).examples()[0]]


def built(memory):
    """Like no other: parameters of the memory drawn large, so that it matters."""
    model = dataclasses.replace(PLAIN, memory=memory).build(rngs=nnx.Rngs(0))
    for leaf in jax.tree.leaves(nnx.state(model.memory), is_leaf=lambda x: isinstance(x, nnx.Param)):
        leaf[...] = 2 * leaf[...]
    if model.encoder is not None:
        rngs = nnx.Rngs(1)
        for leaf in jax.tree.leaves(nnx.state(model.encoder), is_leaf=lambda x: isinstance(x, nnx.Param)):
            leaf[...] = 0.5 * jax.random.normal(rngs.params(), leaf.shape)
    return model


def encoder_of(model):
    """The plain decoder with what is added to queries and values, by hand."""
    plain, share = PLAIN.build(rngs=nnx.Rngs(0)), model.spec.memory.lora.scale / model.spec.memory.lora.rank
    for name in ("query", "value"):
        pair, base = model.encoder.slots[0][name], getattr(plain.slots[0].mixer, name)
        base[...] = base[...] + share * jnp.einsum("pmr,prhd->pmhd", pair["down"][...], pair["up"][...])
    return plain


@jax.jit
def run(model, tokens, segments, state=None, start=None):
    return model(Batch(tokens=tokens, info=causal_info(segments, start)), state)[:2]


def drawn(rows=2, length=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)), jnp.int32)


def wide(tokens, segments, left=0):
    """(tokens, segments) of rows of WIDE tokens, padding before and behind."""
    pad = lambda x: np.pad(np.asarray(x), ((0, 0), (left, WIDE - left - np.shape(x)[1])))
    return pad(tokens), pad(segments)


def ones(length=T):
    return np.ones((2, length), np.int32)


def close(found, wanted, tolerance=5e-6):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(
    scope="module", params=[spec if spec in FEW else pytest.param(spec, marks=pytest.mark.slow) for spec in MEMORIES], ids=names
)
def model(request):
    return built(request.param)


def test_it_equals_calls_of_the_plain_decoder(model):
    spec, tokens = model.spec.memory, drawn()
    memory = {path[0]: leaf for path, leaf in nnx.to_flat_state(nnx.state(model.memory))}
    plain = PLAIN.build(rngs=nnx.Rngs(0))
    lengths = [4, 4, 2]
    if isinstance(spec, RMT):
        wanted, _ = by_segments.rmt(plain, memory["start"][...], tokens, lengths)
    elif isinstance(spec, AutoCompressor):
        options = {"accumulate": spec.accumulate, "most": spec.most}
        wanted, _ = by_segments.auto_compressor(plain, memory["summary"][...], tokens, lengths, **options)
    elif isinstance(spec, ICAE):
        held = {name: leaf[...] for name, leaf in memory.items()}
        wanted, _ = by_segments.icae(plain, encoder_of(model), held, tokens, lengths, most=spec.most)
    else:
        held = {name: leaf[...] for name, leaf in memory.items()}
        wanted, _ = by_segments.hmt(plain, held, tokens, lengths, spec=spec)
    close(run(model, *wide(tokens, ones()))[0][:, :T], wanted)


def test_documents_know_nothing_of_each_other(model):
    tokens, segments = drawn(), np.asarray([[1] * 3 + [2] * 7, [1] * 6 + [2] * 3 + [3]])
    packed = run(model, *wide(tokens, segments, left=1))[0][:, 1:]
    for number in (1, 2, 3):
        alone = np.zeros((2, T), np.int32)
        for row in range(2):
            places = np.flatnonzero(segments[row] == number)
            alone[row, : len(places)] = tokens[row, places]
        held = np.stack([np.arange(T) < (segments[row] == number).sum() for row in range(2)]).astype(np.int32)
        found = run(model, *wide(alone, held))[0]
        for row in range(2):
            places = np.flatnonzero(segments[row] == number)
            close(packed[row, places], found[row, : len(places)])


@pytest.mark.parametrize("chunks", [[1] * T, [7, 3]], ids=["steps", "chunks"])
def test_chunks_and_steps_equal_one_pass(model, chunks):
    tokens, state, found, at = drawn(), model.init_state(2, T), [], 0
    for n, size in enumerate(chunks):
        part = tokens[:, at : at + size], ones(size)
        given = wide(*part, left=n) if size > 1 else part
        y, state = run(model, *given, state, np.asarray([at, at]))
        found.append(y[:, n : n + size] if size > 1 else y)
        at += size
    close(jnp.concatenate(found, axis=1), run(model, *wide(tokens, ones()))[0][:, :T])


def test_the_future_is_not_seen(model):
    tokens = drawn()
    before = run(model, *wide(tokens, ones()))[0]
    for t in (0, 5, 8):
        after = run(model, *wide(tokens.at[:, t].set((tokens[:, t] + 1) % VOCAB), ones()))[0]
        close(after[:, :t], before[:, :t], 1e-7)
        assert np.abs(after[:, t:T] - before[:, t:T]).max(axis=-1).min(axis=0)[0] > 0
        if t < 5:  # what is written of the first segment is read in the next
            assert np.abs(after[:, 4:T] - before[:, 4:T]).max() > 1e-4


def test_rows_generate_as_they_do_alone(model, request):
    if not isinstance(model.spec.memory, RMT) and not request.config.getoption("--slow"):
        pytest.skip("needs --slow")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 3], [5]]
    together = generate(model, prompts, max_new=5, chunk=5)
    for prompt, made in zip(prompts, together, strict=True):
        tokens = [*prompt, *made.ids]
        hidden = run(model, *wide(np.asarray([tokens[:-1]] * 2), ones(len(tokens) - 1)))[0][0]
        chosen = np.argmax(model.logits(hidden), axis=-1)[len(prompt) - 1 : len(tokens) - 1]
        assert len(made.ids) == 5 and chosen.tolist() == made.ids


def test_texts_are_told_back():
    """From all segments of a document, the last as well, which is not whole; whatever is packed beside it."""
    model, tokens = built(ICAE.examples()[0]), drawn()
    plain, memory = PLAIN.build(rngs=nnx.Rngs(0)), model.memory
    held = {"summary": memory.summary[...], "continuing": memory.continuing[...]}
    told = jax.jit(lambda model, tokens, segments: model.autoencoded(Batch(tokens=tokens, info=causal_info(segments))))
    segments = np.asarray([[1] * 10, [1] * 4 + [2] * 6])
    found = told(model, *wide(tokens, segments, left=1))[:, 1:]
    for row, first, last, lengths in ((0, 0, 10, [4, 4, 2]), (1, 0, 4, [4]), (1, 4, 10, [4, 2])):
        text = tokens[row : row + 1, first:last]
        _, bank = by_segments.icae(plain, encoder_of(model), held, text, lengths, most=4)
        close(found[row, first:last], by_segments.told_back(plain, bank, memory.autoencoding[...], text)[0])


def test_segments_of_drawn_lengths():
    """As calls of the plain decoder over segments of those lengths."""
    memory = AutoCompressor(segment=4, slots=2, most=6, shortest=2)
    model, tokens, objective = built(memory), drawn(), RandomSegments()
    plain, batch = PLAIN.build(rngs=nnx.Rngs(0)), Batch(tokens=tokens, info=causal_info(ones()))
    places = objective.drawn(memory, batch, jax.random.key(3))
    given = dataclasses.replace(batch, side={"places": places})
    found = jax.jit(lambda model, batch: model(batch)[0])(model, given)
    lengths = [np.bincount(np.asarray(row) // 4) for row in places]
    assert len({*map(tuple, lengths)}) == 2 and all(2 <= n <= 4 for row in lengths for n in row[:-1])
    for row in range(2):
        text = tokens[row : row + 1]
        wanted, _ = by_segments.auto_compressor(plain, model.memory.summary[...], text, lengths[row].tolist(), most=6)
        close(found[row], wanted[0])


NEIGHBOURS = {
    "convolution": {"embed_mixer": ShortConvolution(taps=2)},
    "delta net": {"pattern": (LAYER, dataclasses.replace(LAYER, mixer=GatedDeltaNet(heads=2, head_dim=4)))},
    "neural memory": {"pattern": (dataclasses.replace(LAYER, mixer=NeuralMemory(heads=2, head_dim=4, chunk=2)),)},
}


@pytest.mark.parametrize(
    "mixers", ["convolution", *(pytest.param(name, marks=pytest.mark.slow) for name in ("delta net", "neural memory"))]
)
def test_beside_mixers_that_read_neighbours(mixers):
    """A document that is shorter than another leaves padding among the vectors of its row, which nothing reads."""
    plain = dataclasses.replace(PLAIN, periods=1, **NEIGHBOURS[mixers])
    memory = AutoCompressor(segment=4, slots=2, most=6)
    model = dataclasses.replace(plain, memory=memory).build(rngs=nnx.Rngs(0))
    tokens, state = drawn(), model.init_state(2, T)
    whole = run(model, *wide(tokens, ones()))[0][:, :T]
    wanted, _ = by_segments.auto_compressor(plain.build(rngs=nnx.Rngs(0)), model.memory.summary[...], tokens, [4, 4, 2], most=6)
    close(whole, wanted, 2e-5)
    first, state = run(model, *wide(tokens[:, :7], ones(7)), state, np.asarray([0, 0]))
    rest = [run(model, tokens[:, 7:8], ones(1), state, np.asarray([7, 7]))]
    close(jnp.concatenate([first[:, :7], rest[0][0]], axis=1), whole[:, :8], 2e-5)


def test_on_a_mesh():
    model, tokens = built(RMT(segment=4, slots=2)), drawn(rows=4)
    batch = Batch(tokens=tokens, info=causal_info(np.asarray([[1] * T, [1] * 4 + [2] * 6] * 2)))

    def scalar(model):
        hidden = model(batch)[0]
        return jnp.sin(hidden).sum(), hidden

    both = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    wanted = both(model)
    with jax.set_mesh(MeshSpec(data=2, fsdp=2, tensor=2).build()):
        found = both(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()), found, wanted)


def test_gradients_stop_where_they_are_told_to():
    """In groups of two segments: nothing of the third reaches the first two; what is in a group does."""
    spec = RMT(segment=2, slots=2, bptt=2)

    def reached(memory):
        model = built(memory)

        def last(model):
            hidden = model(Batch(tokens=tokens, info=causal_info(ones(8))))[0]
            return jnp.sin(hidden[:, 6:]).sum()

        slope = jax.jit(jax.grad(last))(model).embedding[...]
        return [bool(np.abs(slope[token]).max() > 0) for token in range(8)]

    tokens = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 7]] * 2)
    assert reached(spec) == [False] * 4 + [True] * 4
    assert all(reached(dataclasses.replace(spec, bptt=None)))


def test_the_oldest_vectors_go():
    held, count = pushed(jnp.asarray([[[1.0], [2.0], [3.0]]]), jnp.asarray([2]), jnp.asarray([[[7.0], [8.0]]]))
    assert held[0, :, 0].tolist() == [2, 7, 8] and count.tolist() == [3]
    held, count = pushed(jnp.zeros((1, 3, 1)), jnp.asarray([0]), jnp.asarray([[[7.0], [8.0]]]))
    assert held[0, :2, 0].tolist() == [7, 8] and count.tolist() == [2]


def test_a_query_of_later_tokens_cannot_generate():
    model = built(HMT(segment=4, size=3, query="ahead"))
    with pytest.raises(ValueError, match="query = 'ahead': expected 'behind'"):
        model(Batch(tokens=drawn(length=1), info=causal_info(ones(1))), model.init_state(2, 4))
