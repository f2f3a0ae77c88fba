"""A decoder that trains itself equals a loop of gradients, and gives one answer, whatever is packed, padded or generated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Causal, Window
from lcx.batch import Batch, causal_info
from lcx.cache.dense import DenseCache
from lcx.channels.glu import GLU
from lcx.inference.generate import generate
from lcx.memory.ttt_e2e import TTTE2E
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.models.residual import Parallel, Sandwich
from lcx.norms import RMSNorm
from lcx.parallel.mesh import MeshSpec
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.spec import SpecError, edit, edits

VOCAB, T, WIDE = 12, 10, 13
MIXER = Attention(heads=4, kv_heads=2, head_dim=4, mask=Window(size=6), sinks="learned", cache=DenseCache(keys="raw"))
LAYER = Layer(mixer=MIXER, channel=GLU(hidden=8))
MEMORY = TTTE2E(chunk=4, suffix=2, hidden=6)
SPEC = Decoder(vocab=VOCAB, width=8, pattern=(LAYER,), periods=3, documents=3, memory=MEMORY)
SHORT = edits(LAYER, [("mixer.mask", Window(size=2)), ("mixer.persistent", 2), ("mixer.cache.keys", "rotated")])
LONG = edits(LAYER, [("mixer.mask", Window(size=9)), ("mixer.kv_heads", 1), ("residual", Sandwich())])
MIXED = edits(
    SPEC,
    [
        ("pattern", (SHORT, edit(LONG, "mixer.qk_norm", RMSNorm()))),
        ("periods", 2),
        ("memory", edits(MEMORY, [("chunk", 3), ("clip", 0.2)])),
        ("embed_mixer", ShortConvolution(taps=2)),
        ("head", "untied"),
        ("logit_softcap", 3.0),
    ],
)


def built(spec):
    return spec.build(rngs=nnx.Rngs(0))


read = jax.jit(lambda model, tokens, info, state: model(Batch(tokens=tokens, info=info), state)[:2])
info_of = jax.jit(causal_info)
empty = jax.jit(lambda model: model.init_state(2, T))


def run(model, tokens, segments, state=None, start=None, positions=None):
    """Few programs: whole rows and chunks of WIDE tokens, and steps."""
    info = info_of(segments, start)
    info = info if positions is None else dataclasses.replace(info, positions=jnp.asarray(positions[..., None], jnp.float32))
    return read(model, jnp.asarray(tokens), info, state)


def drawn(rows=2, length=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)), jnp.int32)


def wide(tokens, segments=None, left=0):
    """(tokens, segments) of rows of WIDE tokens, padding before and behind."""
    segments = np.ones(np.shape(tokens), np.int32) if segments is None else segments
    pad = lambda x: np.pad(np.asarray(x), ((0, 0), (left, WIDE - left - np.shape(x)[1])))
    return pad(tokens), pad(segments)


def close(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=[SPEC, pytest.param(MIXED, marks=pytest.mark.slow)], ids=["plain", "mixed"])
def model(request):
    return built(request.param)


def by_hand(model, tokens):
    """Hidden states of rows of one document, chunk after chunk; a layer's keys are made anew of what it was given then."""
    spec, prefix, rows = model.spec.memory, model.spec.periods - model.spec.memory.suffix, len(tokens)
    info = lambda length: causal_info(jnp.ones((rows, length), jnp.int32))
    layers = [jax.tree.map(lambda p, n=n: p[n], model.slots[0]) for n in range(model.spec.periods)]
    primes = [jax.tree.map(lambda p, n=n: p[n], model.memory[0]) for n in range(spec.suffix)]
    each = lambda matrix: jnp.broadcast_to(matrix[...], (rows, *matrix.shape))
    fast = [tuple(each(matrix) for matrix in (prime.gate, prime.up, prime.down)) for prime in primes]
    stream, batch = model.embedding[...][tokens], Batch(tokens=tokens, info=info(tokens.shape[1]))
    for layer in layers[:prefix]:
        stream, _, _ = layer(stream, batch)

    def suffix(fast, x, before, tokens):
        given = []
        for layer, prime, (gate, up, down), seen in zip(layers[prefix:], primes, fast, before, strict=True):
            given.append(jnp.concatenate([seen, x], axis=1))
            whole = Batch(tokens=jnp.zeros(given[-1].shape[:2], jnp.int32), info=info(given[-1].shape[1]))
            x = x + layer.mixer(layer.norms[0](given[-1]), whole)[0][:, seen.shape[1] :]
            y = prime.norms[0](x)
            x = x + (jax.nn.silu(y @ gate) * (y @ up)) @ down
            x = x + layer.channel(layer.norms[1](x), tokens)[0]
        return model.final_norm(x), given

    def loss(fast, x, before, tokens, targets):
        logits = model.logits(suffix(fast, x, before, tokens)[0])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean(axis=(1, 2)).sum()

    found, before, size = [], [stream[:, :0]] * spec.suffix, spec.chunk
    for at in range(0, tokens.shape[1], size):
        part = stream[:, at : at + size], before, tokens[:, at : at + size]
        hidden, given = suffix(fast, *part)
        found.append(hidden)
        if at + size < tokens.shape[1]:
            slope = jax.grad(loss)(fast, *part, tokens[:, at + 1 : at + size + 1])
            slope = jax.lax.stop_gradient(slope) if spec.first_order else slope
            norm = jnp.sqrt(sum(jnp.square(leaf).sum(axis=(1, 2)) for leaf in jax.tree.leaves(slope)))
            share = spec.rate * jnp.minimum(1, (spec.clip or jnp.inf) / norm)[:, None, None]
            fast = jax.tree.map(lambda w, g: w - share * g, fast, slope)  # noqa: B023
        before = given
    return jnp.concatenate(found, axis=1)


CASES = {"full": {}, "first order": {"first_order": True, "clip": None, "rate": 0.3}}


def case_of(case):
    return built(edits(SPEC, [(f"memory.{field}", value) for field, value in CASES[case].items()])), drawn()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_equals_a_loop_of_gradients(case):
    model, tokens = case_of(case)
    close(run(model, *wide(tokens))[0][:, :T], jax.jit(by_hand)(model, tokens), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_goes_through_the_steps(case):
    """The gradient by everything of a function of all tokens."""
    model, tokens = case_of(case)
    info = causal_info(jnp.ones_like(tokens))
    in_chunks = lambda model, tokens: model(Batch(tokens=tokens, info=info))[0]
    scalar = lambda model, read: jnp.sin(3 * read(model, tokens)).sum()
    found, wanted = (jax.jit(jax.grad(scalar), static_argnums=1)(model, read) for read in (in_chunks, by_hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5 * np.abs(b).max()), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("bptt", [None, 2])
def test_gradients_stop_where_they_are_told_to(bptt):
    """In groups of two chunks, with no layer before the suffix: nothing of the last two reaches the first two."""
    spec = edits(SPEC, [("memory", edits(MEMORY, [("chunk", 2), ("suffix", 3), ("bptt", bptt)])), ("head", "untied")])
    tokens = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 7]] * 2)
    batch = Batch(tokens=tokens, info=causal_info(jnp.ones_like(tokens)))
    slope = jax.jit(jax.grad(lambda model: jnp.sin(model(batch)[0][:, 6:]).sum()))(built(spec)).embedding[...]
    reached = [bool(np.abs(slope[token]).max() > 0) for token in range(8)]
    assert reached == [bptt is None] * 4 + [True] * 4


def test_documents_know_nothing_of_each_other(model):
    tokens, segments = drawn(), np.asarray([[1] * 3 + [2] * 7, [1] * 5 + [2] * 4 + [3]])
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


@pytest.mark.parametrize("chunks", [[1] * T, [7, 3], [4, 4, 2]], ids=["steps", "chunks", "whole chunks"])
def test_chunks_and_steps_equal_one_pass(model, chunks):
    tokens, state, found, at = drawn(), empty(model), [], 0
    for n, size in enumerate(chunks):
        part = tokens[:, at : at + size]
        given = wide(part, left=n) if size > 1 else (part, np.ones((2, 1), np.int32))
        y, state = run(model, *given, state, np.asarray([at, at]))
        found.append(y[:, n : n + size] if size > 1 else y)
        at += size
    close(jnp.concatenate(found, axis=1), run(model, *wide(tokens))[0][:, :T])


def test_documents_follow_each_other_in_a_state(model):
    """Rows apart, a document that ends within a chunk, and one that ends with it."""
    tokens, segments = drawn(), np.asarray([[1] * 6 + [2] * 4, [1] * 8 + [2] * 2])
    first, state = run(model, *wide(tokens[:, :7], segments[:, :7], left=2), empty(model), np.asarray([0, 0]))
    index = np.asarray([1, 7])
    second, _ = run(model, *wide(tokens[:, 7:], segments[:, 7:]), state, index)
    found = jnp.concatenate([first[:, 2:9], second[:, :3]], axis=1)
    close(found, run(model, *wide(tokens, segments))[0][:, :T])


def test_the_future_is_not_seen(model):
    tokens = drawn()
    before = run(model, *wide(tokens))[0]
    for t in (0, 4, 5, 8):
        after = run(model, *wide(tokens.at[:, t].set((tokens[:, t] + 1) % VOCAB)))[0]
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.abs(after - before)[:, t:T].max(axis=-1).min() > 0


@pytest.mark.slow
def test_rows_generate_as_they_do_alone(model):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2], [5]]
    together = generate(model, prompts, max_new=5, chunk=8)
    for prompt, made in zip(prompts, together, strict=True):
        tokens = [*prompt, *made.ids]
        hidden = run(model, *wide(np.asarray([tokens[:-1]] * 2)))[0][0]
        chosen = np.argmax(model.logits(hidden), axis=-1)[len(prompt) - 1 : len(tokens) - 1]
        assert len(made.ids) == 5 and chosen.tolist() == made.ids


def test_positions_are_read_where_they_are_not_the_index(model):
    """All of them shifted, nothing changes; spread out, something does, and chunks equal one pass."""
    tokens, places = drawn(), np.broadcast_to(np.arange(WIDE), (2, WIDE))
    plain, shifted, spread = (run(model, *wide(tokens), positions=p)[0][:, :T] for p in (places, places + 1000, places**2))
    close(shifted, plain, 1e-4)
    assert np.abs(spread - plain)[:, 2:].max(axis=-1).min() > 1e-5
    state, found = empty(model), []
    for at in (0, 5):
        part = wide(tokens[:, at : at + 5])
        y, state = run(model, *part, state, np.asarray([at, at]), (places + at) ** 2)
        found.append(y[:, :5])
    close(jnp.concatenate(found, axis=1), spread)


def test_what_cannot_be_answered_is_not_a_number():
    """Of seven documents that there is no room for, the last; a row that begins within its document."""
    model, tokens = built(SPEC), drawn(length=WIDE)
    segments = np.asarray([[1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]] * 2)
    lost = np.isnan(run(model, tokens, segments)[0]).all(axis=-1)
    assert not lost[:, :10].any() and lost[:, 10:].all()
    within = info_of(np.ones((2, WIDE), np.int32), np.asarray([0, 2]))
    found = np.isnan(read(model, tokens, within, None)[0]).all(axis=-1)
    assert not found[0].any() and found[1].all()


def test_layers_before_the_suffix_are_read_as_they_are():
    tokens = drawn()
    batch = Batch(tokens=tokens, info=causal_info(np.ones((2, T), np.int32)))
    model, plain = SPEC.build(rngs=nnx.Rngs(0)), edit(SPEC, "memory", None).build(rngs=nnx.Rngs(0))
    stream = jax.jit(lambda model: model(batch, upto=1)[0])
    np.testing.assert_array_equal(stream(model), stream(plain))
    with pytest.raises(ValueError, match="upto = 2: expected none of the last 2 layers"):
        model(batch, upto=2)
    base, more = dict(nnx.to_flat_state(nnx.state(plain))), dict(nnx.to_flat_state(nnx.state(model)))
    assert all(np.array_equal(leaf[...], more[path][...]) for path, leaf in base.items())
    assert all(leaf.get_metadata().get("added") for path, leaf in more.items() if path not in base)


@pytest.mark.slow
@pytest.mark.parametrize("channel_chunk", [None, 3])
def test_on_a_mesh(channel_chunk):
    """And with channel mixers that see a few tokens at a time, whose gradients of gradients are their own."""
    tokens = drawn(rows=4)
    batch = Batch(tokens=tokens, info=causal_info(np.asarray([[1] * T, [1] * 4 + [2] * 6] * 2)))

    def scalar(model):
        hidden = model(batch)[0]
        return jnp.sin(hidden).sum(), hidden

    both = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    wanted = jax.tree.leaves(both(built(SPEC)))
    with jax.set_mesh(MeshSpec(data=2, fsdp=2, tensor=2).build()):
        found = jax.tree.leaves(both(built(edit(SPEC, "channel_chunk", channel_chunk))))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("memory.suffix", 4)], r"model.memory.suffix = 4: expected a multiple of the pattern's 1 up to 3 layers"),
        ([("pattern[0].mixer.mask", Causal())], r"model.pattern\[0\].mixer.mask = Causal\(\): expected a Window beside"),
        ([("pattern[0].residual", Parallel())], r"model.pattern\[0\].residual = .*: expected a form with a place between"),
        ([("pattern[0].mixer", ShortConvolution())], r"model.pattern\[0\].mixer: expected Attention beside"),
        ([("pattern[0].mixer.backend", "xla")], "backend = 'xla': expected 'auto' or 'reference', as kernels have no gradient"),
        (
            [("rope", DynamicNTK(original_length=8)), ("pattern[0].mixer.cache.keys", "raw")],
            "model.pattern.0..mixer: expected a rope that no length changes",
        ),
    ],
)
def test_decoders_that_it_does_not_fit_are_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        edits(SPEC, changes).build(rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_backends_of_a_first_order_suffix_are_the_users():
    spec = edits(SPEC, [("memory.first_order", True), ("pattern[0].mixer.backend", "xla")])
    model, tokens = built(spec), drawn()
    close(run(model, *wide(tokens))[0], run(built(SPEC), *wide(tokens))[0])


@pytest.mark.parametrize("field", ["chunk", "suffix", "hidden", "rate", "clip", "bptt"])
def test_what_cannot_be_is_refused(field):
    with pytest.raises(SpecError, match=rf"TTTE2E\.{field} = "):
        dataclasses.replace(MEMORY, **{field: -1.0 if field in ("rate", "clip") else -1})
