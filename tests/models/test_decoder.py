"""The decoder's options against each other and against a plain restatement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.channel import Channel
from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.models.decoder import REMAT, Decoder, rebuild
from lcx.models.layer import Layer
from lcx.models.residual import DeepNorm, Parallel, PreNorm, Residual, Sandwich
from lcx.norms import LayerNorm, RMSNorm
from lcx.parts import parts
from lcx.positions.linear import LinearInterpolation
from lcx.positions.query_scale import LogN
from lcx.spec import SpecError, edit


def decoder(**options) -> Decoder:
    mixer = Attention(heads=2, kv_heads=1, head_dim=8)
    layer = Layer(mixer=mixer, channel=GLU(hidden=24), **options.pop("layer", {}))
    return Decoder(**({"vocab": 32, "width": 16, "pattern": (layer,), "periods": 2} | options))


def batch(rows=2, length=9):
    tokens = np.random.default_rng(0).integers(0, 32, (rows, length)).astype(np.int32)
    return Batch(tokens=tokens, info=causal_info(np.ones_like(tokens)))


@functools.cache
def built(spec):
    return spec.build(rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnames="upto")
def forward(model, batch, upto):
    return model(batch, upto=upto)[0]


def hidden(spec, given=None, upto=None):
    return forward(built(spec), given or batch(), upto)


@functools.cache
def value_and_gradient(spec):
    loss = lambda model: jnp.square(model.logits(model(batch())[0])).sum()
    return jax.jit(jax.value_and_grad(loss))(built(spec))


@pytest.mark.parametrize("skip", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_layers_are_counted_through_patterns_and_periods(skip):
    """Two periods of two layers: skipping n layers is a pattern of four whose first n have no scale."""
    plain = Layer(mixer=Attention(heads=2, kv_heads=1, head_dim=8), channel=GLU(hidden=24))
    scaled = edit(plain, "mixer.query_scale", LogN(original_length=3))
    skipping = edit(plain, "mixer.query_scale", LogN(original_length=3, skip_layers=skip))
    counted, spelled = decoder(pattern=(skipping,) * 2), decoder(pattern=(plain,) * skip + (scaled,) * (4 - skip), periods=1)
    model = built(counted)
    twin = built(spelled)
    taken = [jax.tree.map(lambda p, n=n: p[n // 2 : n // 2 + 1], model.slots[n % 2]) for n in range(4)]
    parameters = lambda module: nnx.to_flat_state(nnx.state(module))
    state = nnx.state(twin)
    for n, slot in enumerate(taken):
        for path, leaf in parameters(slot):
            held = state["slots"][n]
            for key in path[:-1]:
                held = held[key]
            held[path[-1]][...] = leaf[...]
    nnx.update(twin, state)
    twin.embedding[...] = model.embedding[...]
    np.testing.assert_allclose(forward(model, batch(), None), forward(twin, batch(), None), atol=2e-6)


def rms(x):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)


def test_restated_with_numpy():
    """Two pre-norm layers of grouped attention without rotation, and SwiGLU, in float64."""
    spec = edit(decoder(), "rope", None)
    model, given = built(spec), batch()
    state = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model)))
    x, slot = state["embedding"][given.tokens], state["slots"][0]
    causal = np.tril(np.ones((9, 9), bool))
    for n in range(2):
        mixer, channel = ({name: leaf[n] for name, leaf in slot[part].items()} for part in ("mixer", "channel"))
        y = rms(x)
        q, k, v = (np.einsum("btm,mhd->bthd", y, mixer[name]) for name in ("query", "key", "value"))
        scores = np.where(causal, np.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / np.sqrt(8), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("bhts,bsd,hdm->btm", weights, v[:, :, 0], mixer["output"])
        y = rms(x)
        gate = y @ channel["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ channel["up"])) @ channel["down"]
    np.testing.assert_allclose(hidden(spec), rms(x), atol=1e-5)
    np.testing.assert_allclose(model.logits(hidden(spec)), rms(x) @ state["embedding"].T, atol=1e-5)


def test_residual_forms_by_hand():
    x = jnp.asarray([1.0, 2.0])
    mixer, channel, norm = (lambda h: 10 * h), (lambda h: h + 1), (lambda h: h / 2)
    join = lambda residual: residual.join(x, mixer, channel, [norm] * residual.norms).tolist()
    assert join(PreNorm()) == [6 + 4, 12 + 7]
    assert join(Parallel()) == [1 + 5 + 1.5, 2 + 10 + 2]
    assert join(Sandwich()) == [3.5 + 1.375, 7 + 2.25]
    assert join(DeepNorm(alpha=2.0)) == [(12 + 7) / 2, (24 + 13) / 2]


@pytest.mark.parametrize("cls", parts(Residual))
def test_residual_gain_scales_the_written_weights(cls):
    spec = next(iter(cls.examples()))
    one, other = (decoder(layer={"residual": residual}) for residual in (PreNorm(), spec))
    first, second = (nnx.to_pure_dict(nnx.state(built(s)))["slots"][0] for s in (one, other))
    np.testing.assert_allclose(second["mixer"]["output"], first["mixer"]["output"] * spec.gain, rtol=1e-6)
    np.testing.assert_array_equal(second["mixer"]["query"], first["mixer"]["query"])
    assert np.isfinite(hidden(other)).all()


@pytest.mark.parametrize("norm", [RMSNorm(), RMSNorm(offset=1.0), LayerNorm()])
def test_norms_in_bfloat16_keep_float32_statistics(norm):
    x = (np.random.default_rng(0).normal(size=(4, 64)) + 30).astype(np.float32)
    wide = x - x.mean(-1, keepdims=True) if isinstance(norm, LayerNorm) else x
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + norm.eps)
    module = norm.build(64)
    np.testing.assert_allclose(module(jnp.asarray(x)), expected, atol=1e-4)
    assert module(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_pattern_of_periods_is_the_layers_in_order():
    """Two periods of one layer equal one period of two layers with the same parameters."""
    deep, wide = decoder(), edit(edit(decoder(), "periods", 1), "pattern", decoder().pattern * 2)
    source, target = built(deep), wide.build(rngs=nnx.Rngs(0))
    held = nnx.to_pure_dict(nnx.state(source))
    state = nnx.state(target)
    split = {n: jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], held["slots"][0]) for n in range(2)}
    nnx.replace_by_pure_dict(state, held | {"slots": split})
    nnx.update(target, state)
    np.testing.assert_allclose(forward(target, batch(), None), hidden(deep), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"remat": "attention"},
        {"remat": "offload"},
        {"channel_chunk": 4},
        {"unroll": "all"},
        *(
            pytest.param({"remat": name}, marks=pytest.mark.slow)
            for name in REMAT
            if name not in ("none", "attention", "offload")
        ),
        pytest.param({"unroll": 2}, marks=pytest.mark.slow),
    ],
)
def test_remat_chunks_and_unroll_change_nothing(options):
    (value, gradient), (other, others) = value_and_gradient(decoder()), value_and_gradient(decoder(**options))
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def kept(remat):
    """Shapes that the forward pass keeps for the backward pass, by where they are: of arrays, none of which is a parameter."""
    graph, state = nnx.split(nnx.eval_shape(lambda: decoder(remat=remat, periods=3).build(rngs=nnx.Rngs(0))))
    loss = lambda state: jnp.square(nnx.merge(graph, state)(batch())[0]).sum()
    scan = lambda jaxpr: next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    stacked = scan(jax.make_jaxpr(jax.grad(loss))(state).jaxpr).outvars
    found = [(v.aval.shape, "host" if "host" in str(v.aval) else "device") for v in stacked]
    return {(shape[1:], place) for shape, place in found if shape[:1] == (3,) and shape[1:2] == (2,)}


def test_what_each_policy_keeps_of_a_layer():
    """Of rows [2, 9]: the stream (width 16), attention's out (2 heads of 8) and logsumexp."""
    stream, out, lse = (2, 9, 16), (2, 9, 2, 8), (2, 9, 2)
    on = lambda place, *shapes: {(shape, place) for shape in shapes}
    assert kept("full") == on("device", stream)
    assert kept("attention") == on("device", stream, out, lse)
    assert kept("offload") == on("host", stream, out, lse)
    assert kept("none") > kept("attention")


def test_bfloat16_is_close_and_parameters_stay_float32():
    spec = decoder(compute="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(built(spec)))} == {np.dtype("float32")}
    np.testing.assert_allclose(hidden(spec).astype(jnp.float32), hidden(decoder()), atol=0.1)


def test_heads_and_soft_cap():
    tied, untied = decoder(), decoder(head="untied", logit_softcap=2.0)
    model = built(untied)
    x = jnp.ones((3, 16)) * 5
    np.testing.assert_allclose(model.logits(x), 2 * np.tanh(x @ model.head[...] / 2), atol=1e-5)
    count = lambda spec: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built(spec))))
    assert count(untied) - count(tied) == 16 * 32


def test_embeds_replace_negative_tokens():
    given = batch()
    spec, model = decoder(), built(decoder())
    table = np.asarray(model.embedding[...])
    tokens = np.where(np.arange(9) % 2 == 0, -1, given.tokens)
    mixed = Batch(tokens=tokens, info=given.info, embeds=table[given.tokens])
    np.testing.assert_allclose(hidden(spec, mixed), hidden(spec, given), atol=1e-6)


def test_upto_gives_the_stream_between_layers():
    spec, model = decoder(), built(decoder())
    np.testing.assert_allclose(hidden(spec, upto=0), model.embedding[...][batch().tokens], atol=1e-6)
    np.testing.assert_allclose(model.final_norm(hidden(spec, upto=2)), hidden(spec), atol=1e-6)
    with pytest.raises(ValueError, match="upto = 3: expected a multiple of 1 from 0 to 2"):
        model(batch(), upto=3)
    with pytest.raises(ValueError, match="upto needs state=None"):
        model(batch(), model.init_state(2, 9), upto=1)


def test_rebuild_keeps_parameters_and_refuses_others():
    model = built(decoder())
    far = rebuild(model, edit(decoder(), "rope", LinearInterpolation(factor=4.0)))
    assert not np.allclose(forward(far, batch(), None), hidden(decoder()), atol=1e-3)
    np.testing.assert_array_equal(far.embedding[...], model.embedding[...])
    with pytest.raises(SpecError, match="other parameters"):
        rebuild(model, edit(decoder(), "head", "untied"))


def test_program_does_not_grow_with_depth():
    def size(periods):
        model = nnx.eval_shape(lambda: decoder(periods=periods).build(rngs=nnx.Rngs(0)))
        return len(jax.jit(lambda model: model(batch())[0]).lower(model).as_text())

    assert size(16) < 1.02 * size(4)


def test_impossible_decoders_are_refused():
    with pytest.raises(SpecError, match=r"Decoder\.channel_chunk = 0: expected at least 1 token, or None"):
        decoder(channel_chunk=0)
    with pytest.raises(SpecError, match=r"Attention\.heads = 3: expected a multiple of kv_heads = 2"):
        Attention(heads=3, kv_heads=2, head_dim=8)
    with pytest.raises(SpecError, match=r"Decoder\.unroll = 3"):
        decoder(unroll=3)


def test_a_channel_that_reports_on_all_tokens_is_not_cut_into_chunks():
    class Reporting(nnx.Module):
        def __call__(self, x, tokens):
            return x, {"balance_loss": jnp.float32(0.0)}

    class Report(Channel):
        def build(self, inherited, *, rngs):
            return Reporting()

    layer = Layer(mixer=Attention(heads=2, kv_heads=1, head_dim=8), channel=Report())
    decoder(pattern=(layer,)).build(rngs=nnx.Rngs(0))
    with pytest.raises(SpecError, match="channel_chunk = 4: expected None, since Reporting reports balance_loss"):
        decoder(pattern=(layer,), channel_chunk=4).build(rngs=nnx.Rngs(0))


def test_every_channel_mixes_one_token_at_a_time():
    from lcx.mixers.mixer import Inherited
    from lcx.parallel.rules import Rules

    inherited = Inherited(width=16, depth=1, rope=None, compute="float32", rules=Rules())
    for cls in parts(Channel):
        for spec in cls.examples():
            module = spec.build(inherited, rngs=nnx.Rngs(0))
            x = jax.random.normal(jax.random.key(0), (2, 5, 16))
            y, aux = module(x, jnp.zeros((2, 5), jnp.int32))
            changed, _ = module(x.at[:, 2].add(1.0), jnp.zeros((2, 5), jnp.int32))
            assert y.shape == x.shape and isinstance(aux, dict)
            differs = np.abs(np.asarray(changed - y)).max(axis=(0, 2)) > 0
            assert differs.tolist() == [False, False, True, False, False]
