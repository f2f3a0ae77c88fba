"""Every mixer keeps the contract: one answer whatever the chunks, the packing and the padding, and nothing from the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.mixers.mixer import Inherited, Mixer
from lcx.parallel.rules import Rules
from lcx.parts import parts
from lcx.positions.rope import Rope

WIDTH, LENGTH = 16, 13
SLOTS, PADDED = LENGTH + 1, LENGTH + 5  # one length of everything, so that little is compiled
EXAMPLES = [(f"{cls.__name__}-{n}", spec) for cls in parts(Mixer) for n, spec in enumerate(cls.examples())]


def test_every_mixer_has_examples():
    assert all(cls.examples() for cls in parts(Mixer))


@pytest.fixture(scope="module", params=[spec for _, spec in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def mixer(request):
    inherited = Inherited(width=WIDTH, depth=1, rope=Rope(), compute="float32", rules=Rules())
    module = request.param.build(inherited, rngs=nnx.Rngs(0))
    run = jax.jit(lambda module, x, batch, state: module(x, batch, state)[:2])
    return module, lambda x, segments, state=None, start=None: run(module, x, batch_of(segments, start), state)


def batch_of(segments, start=None):
    return Batch(tokens=jnp.zeros_like(jnp.asarray(segments)), info=causal_info(segments, start))


def inputs(rows=1, length=LENGTH, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, length, WIDTH)), jnp.float32)


def padded(x, left, length):
    """(x, segments) with noise before and behind it."""
    segments = np.zeros((1, length), np.int32)
    segments[:, left : left + x.shape[1]] = 1
    return inputs(1, length, seed=1).at[:, left : left + x.shape[1]].set(x), segments


def ones(length=LENGTH, rows=1):
    return np.ones((rows, length), np.int32)


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [6, 1, 6]], ids=["steps", "chunks"])
def test_chunks_and_steps_equal_the_parallel_form(mixer, chunks):
    module, run = mixer
    x, state, got, at = inputs(), module.init_state(1, SLOTS), [], 0
    for size in chunks:
        y, state = run(x[:, at : at + size], ones(size), state, np.asarray([at]))
        got.append(y)
        at += size
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), run(x, ones())[0], atol=2e-6)


def test_packed_equals_separate(mixer):
    _, run = mixer
    x, segments = inputs(), np.asarray([[1] * 4 + [2] * 8 + [3]])
    packed = run(x, segments)[0]
    for a, b in ((0, 4), (4, 12), (12, 13)):
        alone = run(*padded(x[:, a:b], 0, LENGTH))[0]
        np.testing.assert_allclose(packed[:, a:b], alone[:, : b - a], atol=2e-6)


@pytest.mark.parametrize("left", [0, 2, 5])
def test_padding_changes_nothing(mixer, left):
    module, run = mixer
    x = inputs()
    given, expected = padded(x, left, PADDED), run(x, ones())[0]
    np.testing.assert_allclose(run(*given)[0][:, left : left + LENGTH], expected, atol=2e-6)
    y, state = run(*given, module.init_state(1, SLOTS), np.asarray([0]))
    np.testing.assert_allclose(y[:, left : left + LENGTH], expected, atol=2e-6)
    after, _ = run(inputs(1, 1, seed=2), ones(1), state, np.asarray([LENGTH]))
    longer = run(jnp.concatenate([x, inputs(1, 1, seed=2)], axis=1), ones(SLOTS))[0]
    np.testing.assert_allclose(after, longer[:, -1:], atol=2e-6)


def test_rows_of_different_lengths_decode_together(mixer):
    module, run = mixer
    x, segments = inputs(2), np.asarray([[1] * 6 + [0] * 7, [0] * 4 + [1] * 9])
    _, state = run(x, segments, module.init_state(2, SLOTS), np.asarray([0, 0]))
    step = inputs(2, 1, seed=3)
    together, _ = run(step, ones(1, 2), state, np.asarray([6, 9]))
    for row, (a, b) in enumerate(((0, 6), (4, 13))):
        whole = jnp.concatenate([x[row : row + 1, a:b], step[row : row + 1]], axis=1)
        np.testing.assert_allclose(together[row, 0], run(*padded(whole, 0, SLOTS))[0][0, b - a], atol=2e-6)


@pytest.mark.parametrize("t", [0, 6, 12])
def test_the_future_is_not_seen(mixer, t):
    _, run = mixer
    x = inputs()
    before, after = run(x, ones())[0], run(x.at[:, t].add(1.0), ones())[0]
    np.testing.assert_array_equal(before[:, :t], after[:, :t])


def test_gradients_are_finite_and_reach_every_parameter(mixer):
    module, _ = mixer
    segments = np.asarray([[0] + [1] * 7 + [2] * 5])

    def loss(module, x):
        return jnp.square(module(x, batch_of(segments))[0]).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(module, inputs())):
        assert np.isfinite(leaf).all() and np.any(leaf != 0)
