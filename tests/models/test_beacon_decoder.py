"""A decoder with beacons gives one answer, whatever is packed, padded, chunked, generated or shared out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.inference.generate import generate
from lcx.memory.activation_beacon import ActivationBeacon, lay_out
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.norms import RMSNorm
from lcx.objectives.beacon_modeling import BeaconModeling
from lcx.parallel.mesh import MeshSpec
from lcx.spec import SpecError

VOCAB, T, WIDE = 12, 13, 16
MIXER = Attention(heads=4, kv_heads=2, head_dim=4, qk_norm=RMSNorm(), bias="qkv", softcap=5.0, sinks="learned", scale=0.6)
LAYER = Layer(mixer=MIXER, channel=GLU(hidden=8))
PLAIN = Decoder(vocab=VOCAB, width=8, pattern=(LAYER,), periods=2, embed_mixer=ShortConvolution(taps=2))
INTERLEAVED, STEP, SEGMENT = ActivationBeacon.examples()


def built(memory, plain=PLAIN):
    """Beacons drawn unlike the model's own projections, so that they matter."""
    model = dataclasses.replace(plain, memory=memory).build(rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(1)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if leaf.get_metadata().get("added"):
            leaf[...] = jax.random.normal(rngs.params(), leaf.shape)
            assert "memory" in path or "beacon" in str(path[-1])
    return model


@jax.jit
def run(model, tokens, segments, state=None, start=None, ratios=None):
    side = {} if ratios is None else {"ratios": ratios}
    return model(Batch(tokens=tokens, info=causal_info(segments, start), side=side), state)[:2]


def drawn(rows=2, length=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)), jnp.int32)


def wide(tokens, left=0, segments=None):
    """(tokens, segments) of rows of WIDE tokens, padding before and behind."""
    segments = np.ones(tokens.shape, np.int32) if segments is None else segments
    pad = lambda x: np.pad(np.asarray(x), ((0, 0), (left, WIDE - left - np.shape(x)[1])))
    return pad(tokens), pad(segments)


def close(found, wanted, tolerance=5e-6):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


SPECS = [INTERLEAVED, STEP, pytest.param(SEGMENT, marks=pytest.mark.slow)]  # the authors' windows show the third


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: f"{spec.layout}-{spec.coverage}")
def model(request):
    return built(request.param)


@pytest.mark.parametrize("chunks", [[1] * T, [6, 1, 6]], ids=["steps", "chunks"])
def test_chunks_and_steps_equal_one_pass(model, chunks):
    tokens, state, found, at = drawn(), model.init_state(2, T), [], 0
    for n, size in enumerate(chunks):
        part = tokens[:, at : at + size]
        given = wide(part, left=n) if max(chunks) > 1 else (part, np.ones((2, 1), np.int32))
        y, state = run(model, *given, state, np.asarray([at, at]))
        found.append(y[:, n : n + size] if max(chunks) > 1 else y)
        at += size
    close(jnp.concatenate(found, axis=1), run(model, *wide(tokens))[0][:, :T])
    assert not np.any(state.decoder["layers"][0].overflow)


def test_documents_know_nothing_of_each_other(model):
    tokens, segments = drawn(), np.asarray([[1] * 5 + [2] * 8, [1] * 9 + [2] * 3 + [3]])
    packed = run(model, *wide(tokens, 1, segments))[0][:, 1:]
    for number in (1, 2, 3):
        alone = np.zeros((2, T), np.int32)
        for row in range(2):
            places = np.flatnonzero(segments[row] == number)
            alone[row, : len(places)] = tokens[row, places]
        held = np.stack([np.arange(T) < (segments[row] == number).sum() for row in range(2)]).astype(np.int32)
        found = run(model, *wide(alone, 0, held))[0]
        for row in range(2):
            places = np.flatnonzero(segments[row] == number)
            close(packed[row, places], found[row, : len(places)])


def test_the_future_is_not_seen_and_the_past_is(model):
    tokens = drawn()
    before = run(model, *wide(tokens))[0]
    for t in (0, 5, 8):
        after = run(model, *wide(tokens.at[:, t].set((tokens[:, t] + 1) % VOCAB)))[0]
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        reaches = model.spec.memory.most is None or t > 0  # the first beacons are gone
        assert (np.abs(after[:, 12] - before[:, 12]).max() > 1e-5) == reaches


def test_rows_generate_as_they_do_alone(model, request):
    if model.spec.memory != INTERLEAVED and not request.config.getoption("--slow"):
        pytest.skip("needs --slow")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 3], [5]]
    for prompt, made in zip(prompts, generate(model, prompts, max_new=5, chunk=5), strict=True):
        tokens = [*prompt, *made.ids]
        hidden = run(model, *wide(np.asarray([tokens[:-1]] * 2)))[0][0]
        chosen = np.argmax(model.logits(hidden), axis=-1)[len(prompt) - 1 : len(tokens) - 1]
        assert len(made.ids) == 5 and chosen.tolist() == made.ids


def test_a_text_within_the_first_window_is_the_models_own_bit_for_bit():
    memory = dataclasses.replace(STEP, window=16)
    tokens = drawn()
    plain = PLAIN.build(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(run(built(memory), *wide(tokens))[0][:, :T], run(plain, *wide(tokens))[0][:, :T])
    new = dataclasses.replace(PLAIN, memory=INTERLEAVED).build(rngs=nnx.Rngs(0))
    base, more = nnx.to_flat_state(nnx.state(plain)), dict(nnx.to_flat_state(nnx.state(new)))
    assert all(np.array_equal(leaf[...], more[path][...]) for path, leaf in base)
    assert all(leaf.get_metadata().get("added") for path, leaf in more.items() if path not in dict(base))


def test_ratios_of_windows(model, request):
    """What is drawn for a window holds for it alone; windows that all keep their own are plain attention."""
    if model.spec.memory != INTERLEAVED and not request.config.getoption("--slow"):
        pytest.skip("needs --slow")
    spec = dataclasses.replace(model.spec.memory, ratios=(0, 4), most=None)
    several, tokens = built(spec), drawn()
    ratios = jnp.broadcast_to(jnp.asarray([4] * 4 + [0] * 4 + [2] * 8), (2, WIDE))
    given = wide(tokens, 0, np.asarray([[1] * T, [1] * 9 + [2] * 4]))
    found = run(several, *given, None, None, ratios)[0]
    close(found[0, :T], run(several, *wide(tokens[:1], 0), None, None, ratios[:1])[0][0, :T])
    same = built(dataclasses.replace(spec, ratio=4))
    close(found[:, :4], run(same, *given)[0][:, :4])
    assert np.abs(found[0, 8:T] - run(same, *given)[0][0, 8:T]).max() > 1e-3
    kept = built(dataclasses.replace(spec, ratios=(0,), sink=0))  # all windows keep their own: plain attention
    plain = PLAIN.build(rngs=nnx.Rngs(0))
    close(run(kept, *given, None, None, jnp.zeros((2, WIDE), jnp.int32))[0][0, :T], run(plain, *given)[0][0, :T])


def test_the_oldest_beacons_go():
    """Windows of 4, 2 beacons each, of which 3 are read; in two layers one reads what stands in it, and no beacon's memory."""
    tokens = drawn()

    def seen(model, t):
        given = [tokens, tokens.at[:, t].set((tokens[:, t] + 1) % VOCAB)]
        before, after = (run(model, *wide(x))[0][:, 12] for x in given)
        return bool((before != after).any())

    plain = dataclasses.replace(PLAIN, embed_mixer=None)
    model, with_sink = built(SEGMENT, plain), built(dataclasses.replace(SEGMENT, sink=1), plain)
    for one in (model, with_sink):
        assert [seen(one, t) for t in (1, 2, 3, 4, 5, 6, 8, 11)] == [False] * 5 + [True] * 3
    assert (seen(model, 0), seen(with_sink, 0)) == (False, True)


@pytest.mark.parametrize(
    ("spec", "axes"),
    [
        (INTERLEAVED, {"context": 4, "tensor": 2}),
        pytest.param(STEP, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(STEP, {"context": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=["tokens", "rows", "both"],
)
def test_on_a_mesh(spec, axes):
    model, tokens = built(spec), drawn(rows=4, length=WIDE)
    batch = Batch(tokens=tokens, info=causal_info(np.asarray([[1] * WIDE, [1] * 4 + [2] * (WIDE - 4)] * 2)))

    def scalar(model):
        hidden = model(batch)[0]
        return jnp.sin(hidden).sum(), hidden

    both = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    wanted = both(model)
    with jax.set_mesh(MeshSpec(**axes).build()):
        found = both(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()), found, wanted)


def test_drawn_ratios():
    objective = BeaconModeling(ratios=(2, 4), weights=(1.0, 3.0))
    info = causal_info(np.ones((64, 33), np.int32))
    batch = Batch(tokens=jnp.zeros((64, 33), jnp.int32), info=info)
    ratios = objective.drawn(INTERLEAVED, batch, jax.random.key(0))
    windows = np.asarray(ratios)[:, :32].reshape(64, 8, 4)
    assert (windows == windows[..., :1]).all() and (np.asarray(ratios)[:, 32] == 0).all()
    assert 0.6 < (windows == 4).mean() < 0.9 and set(np.unique(windows)) == {2, 4}
    alike = dataclasses.replace(objective, each="row").drawn(INTERLEAVED, batch, jax.random.key(0))
    assert (np.asarray(alike)[:, :32] == np.asarray(alike)[:, :1]).all() and len(np.unique(np.asarray(alike)[:, 0])) == 2


def test_places_are_those_of_the_list_of_keys():
    """Of the last token of 400, with the oldest beacons gone: to the sink, the kept beacons and its own window."""
    spec = dataclasses.replace(INTERLEAVED, sink=1, most=3)
    info = lay_out(spec, causal_info(np.ones((1, 400), np.int32)), 200)
    last, dropped = 399, 1 + 99 * 2 - 1 - 3
    assert info.seen[0, last] == 199 and info.positions[0, last, 0] - dropped == 1 + 3 + 4
    held, sinks = info.held(first=1), info.held(behind=1)
    assert np.flatnonzero(sinks.segments[0]).tolist() == [0]
    kept = [n for n in np.flatnonzero(held.segments[0]) if 0 < 199 - int(held.index[0, n]) + 1 <= 3]
    assert (np.asarray(held.positions)[0, kept, 0] - dropped).tolist() == [1, 2, 3]
    assert spec.positions(400, 2) == 1 + 3 + 4 + 2


def test_ratios_that_are_none_of_its_own():
    model, tokens = built(dataclasses.replace(INTERLEAVED, ratios=(4,))), drawn()
    given = lambda ratios: run(model, *wide(tokens), None, None, jnp.broadcast_to(jnp.asarray(ratios), (2, WIDE)))[0][:, :T]
    assert np.isfinite(given([2] * 4 + [4] * 12)).all() and np.isnan(given([2] * 4 + [1] * 12)).any()
    dropped = given([0] * 4 + [4] * 12)
    assert np.isnan(dropped[:, 4:]).all()
    batch = Batch(tokens=tokens, info=causal_info(np.ones((2, T), np.int32)), targets=tokens, loss_weights=jnp.ones((2, T)))
    with pytest.raises(ValueError, match=r"ratios = \(2, 8\): the model's memory has no \[8\]"):
        BeaconModeling(ratios=(2, 8)).loss(model, batch, jax.random.key(0))


def test_a_ratio_that_fits():
    spec = ActivationBeacon(window=1024, ratio=8, ratios=(2, 4, 8, 16, 32, 128))
    assert [spec.fitting(n, 4096).ratio for n in (1000, 6144, 6145, 100_000, 393_216)] == [2, 2, 4, 128, 128]
    with pytest.raises(SpecError, match=r"ratios.*expected one large enough for 400000 tokens at 4096 positions"):
        spec.fitting(400_000, 4096)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ratio": 3}, "ratio"),
        ({"ratios": (3,)}, "ratios"),
        ({"coverage": "step"}, "coverage"),
        ({"previous": False}, "previous"),
        ({"sink": 5}, "sink"),
        ({"most": 0}, "most"),
        ({"own": ()}, "own"),
        ({"own": ("key", "key")}, "own"),
    ],
)
def test_what_cannot_be_is_refused(change, field):
    with pytest.raises(SpecError, match=rf"ActivationBeacon\.{field} = "):
        dataclasses.replace(INTERLEAVED, **change)
