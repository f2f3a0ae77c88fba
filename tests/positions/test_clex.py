"""CLEX's equation against float64, what it is before training, and a model that has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.cache.dense import DenseCache
from lcx.channels.glu import GLU
from lcx.inference.generate import generate
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.parallel.rules import Rules
from lcx.positions.clex import CLEX
from lcx.positions.ntk import NTK
from lcx.spec import SpecError

GOLDEN = "1 0.27029613 0.073059996 0.019747834 0.005337763 0.0014427766 0.00038997694 0.00010540926"  # t = 2, r = 16


def built(activation="tanh", seed=0):
    module = CLEX(original_length=256, largest=4, activation=activation).build(16, rngs=nnx.Rngs(0))
    module.down[...] = jnp.asarray(np.random.default_rng(seed).normal(size=module.down.shape) * 0.03, jnp.float32)
    return module


def test_before_training_it_is_ntk():
    module = CLEX(original_length=256, largest=4).build(16, rngs=nnx.Rngs(0))
    found = module()
    np.testing.assert_allclose(found.inv_freq[1], [float(x) for x in GOLDEN.split()], rtol=2e-6)
    assert [int(found.row(n)) for n in np.asarray([1, 256, 257, 512, 513, 4000])] == [0, 0, 1, 1, 2, 3]
    for t in (1, 2, 3, 4):
        wanted = NTK(factor=2.0 * t - 1).inverse_frequencies(16, 256)
        np.testing.assert_array_equal(found.inv_freq[t - 1], wanted.astype(np.float32))


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_the_equation_in_float64(activation):
    module = built(activation)
    up, down = (np.asarray(x[...], np.float64) for x in (module.up, module.down))
    act = np.tanh if activation == "tanh" else lambda x: x / (1 + np.exp(-x))
    c, r = np.arange(0, 16, 2), 16
    ntk = lambda t: -c / r * (np.log(1e4) + r / (r - 2) * np.log(2 * t - 1))
    rate = lambda t, z: act((z + ntk(t)) @ up) @ down - c / (r - 2) * 2 / (2 * t - 1)
    z, n = ntk(1), 1000
    for i in range(3 * n):
        t, h = 1 + i / n, 1 / n
        k1 = rate(t, z)
        k2 = rate(t + h / 2, z + h / 2 * k1)
        k3 = rate(t + h / 2, z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(t + h, z + h * k3))
    found = np.asarray(jax.jit(lambda module: module().inv_freq)(module))
    np.testing.assert_allclose(found[3], np.exp(z), rtol=3e-6)
    assert np.abs(np.exp(z - ntk(4)) - 1).max() > 0.05


def decoder(**options) -> Decoder:
    mixer = Attention(heads=2, kv_heads=1, head_dim=8, cache=DenseCache(keys="raw"))
    layer = Layer(mixer=mixer, channel=GLU(hidden=16))
    return Decoder(**({"vocab": 32, "width": 16, "pattern": (layer,), "periods": 1} | options))


@jax.jit
def hidden(model, batch):
    return model(batch)[0]


ROPE = CLEX(original_length=6, largest=3, steps=3)


@pytest.mark.slow
def test_a_model_learns_it_and_reads_its_documents_by_their_length():
    """Its gradient is that of finite differences; documents on both sides of the window, packed, are turned each by its own."""
    model = decoder(rope=ROPE).build(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    model.rope.down[...] = jnp.asarray(rng.normal(size=model.rope.down.shape) * 0.1, jnp.float32)
    tokens = rng.integers(0, 32, (1, 17)).astype(np.int32)
    batch = Batch(tokens=tokens, info=causal_info(np.asarray([[1] * 5 + [2] * 12])))

    graph, state = nnx.split(model)
    held = nnx.to_pure_dict(state)

    @jax.jit
    def loss(down):
        changed = nnx.State(state)
        nnx.replace_by_pure_dict(changed, held | {"rope": held["rope"] | {"down": down}})
        return jnp.sin(nnx.merge(graph, changed)(batch)[0]).sum()

    down, direction = model.rope.down[...], jnp.asarray(rng.normal(size=model.rope.down.shape), jnp.float32)
    slope = float((jax.grad(loss)(down) * direction).sum())
    numeric = float(loss(down + 1e-3 * direction) - loss(down - 1e-3 * direction)) / 2e-3
    assert abs(slope) > 1e-2 and slope == pytest.approx(numeric, rel=2e-2)
    for cut, rule in ((slice(0, 5), 0), (slice(5, 17), 1)):
        alone = Batch(tokens=tokens[:, cut], info=causal_info(np.ones((1, cut.stop - cut.start), np.int32)))
        np.testing.assert_allclose(hidden(model, batch)[:, cut], hidden(model, alone), atol=2e-5, err_msg=str(rule))


@pytest.mark.slow
def test_generation_equals_one_pass():
    model = decoder(rope=ROPE).build(rngs=nnx.Rngs(0))
    model.rope.down[...] = jnp.full(model.rope.down.shape, 0.05)
    prompt = [3, 1, 4, 1, 5]
    (row,) = generate(model, [prompt], max_new=4, chunk=5)
    whole = np.asarray([[*prompt, *row.ids]], np.int32)
    best = model.logits(hidden(model, Batch(tokens=whole, info=causal_info(np.ones_like(whole)))))[0].argmax(axis=-1)
    assert row.ids == best[len(prompt) - 1 : -1].tolist()


def test_what_cannot_learn_it_is_refused():
    with pytest.raises(SpecError, match=r"rope = .*: expected 'model' where it is learned: one for all layers"):
        Attention(heads=2, kv_heads=1, head_dim=8, rope=ROPE)
    two = (decoder().pattern[0], Layer(mixer=Attention(heads=1, kv_heads=1, head_dim=16), channel=GLU(hidden=16)))
    with pytest.raises(SpecError, match=r"rope = .*: expected heads of one size, not \[8, 16\], to learn frequencies for"):
        decoder(rope=ROPE, pattern=two).build(rngs=nnx.Rngs(0))
    outside = Attention(heads=2, kv_heads=1, head_dim=8).build(
        Inherited(width=16, depth=1, rope=ROPE, compute="float32", rules=Rules()), rngs=nnx.Rngs(0)
    )
    text = Batch(tokens=np.zeros((1, 2), np.int32), info=causal_info(np.ones((1, 2), np.int32)))
    with pytest.raises(ValueError, match="its model's rope is learned: expected its frequencies in `place`"):
        outside(jnp.zeros((1, 2, 16)), text)
    with pytest.raises(SpecError, match="rebuild: the edited spec has other parameters"):
        rebuild(decoder().build(rngs=nnx.Rngs(0)), decoder(rope=ROPE))
