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

WIDTH, LENGTH, WIDE = 16, 13, 18  # every call is of two rows of WIDE tokens, or of one token each: little is compiled
EXAMPLES = [(f"{cls.__name__}-{n}", spec) for cls in parts(Mixer) for n, spec in enumerate(cls.examples())]
LONG = [  # to compile: further forms of memories that are trained by what they read, and one of two that join such a memory
    spec for name, spec in EXAMPLES if (spec.chunked and not name.endswith("-0")) or name.startswith("TitansMAL")
]


def test_every_mixer_has_examples():
    assert all(cls.examples() for cls in parts(Mixer))


MARKED = [pytest.param(spec, marks=pytest.mark.slow) if spec in LONG else spec for _, spec in EXAMPLES]


@pytest.fixture(scope="module", params=MARKED, ids=[name for name, _ in EXAMPLES])
def mixer(request):
    inherited = Inherited(width=WIDTH, depth=1, rope=Rope(), compute="float32", rules=Rules(), documents=3)
    module = request.param.build(inherited, rngs=nnx.Rngs(0))
    run = jax.jit(lambda module, x, batch, state: module(x, batch, state)[:2])
    return module, lambda x, segments, state=None, start=None: run(module, x, batch_of(segments, start), state)


def batch_of(segments, start=None):
    return Batch(tokens=jnp.zeros_like(jnp.asarray(segments)), info=causal_info(segments, start))


def inputs(length=LENGTH, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, length, WIDTH)), jnp.float32)


def wide(x, segments, left=0):
    """(x, segments) of two rows of WIDE tokens, noise in the padding before and behind them."""
    left = np.broadcast_to(left, 2)
    rows, all_segments = inputs(WIDE, seed=1), np.zeros((2, WIDE), np.int32)
    for row in range(2):
        places = slice(left[row], left[row] + x.shape[1])
        rows, all_segments[row, places] = rows.at[row, places].set(x[row]), segments[row]
    return rows, all_segments


def ones(length=LENGTH):
    return np.ones((2, length), np.int32)


def close(found, wanted, module):
    """A memory that is trained by what it reads makes more of a rounding."""
    tolerance = 5e-5 if module.spec.chunked else 4e-6
    np.testing.assert_allclose(found, wanted, rtol=tolerance / 2, atol=tolerance)


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [6, 1, 6]], ids=["steps", "chunks"])
def test_chunks_and_steps_equal_the_parallel_form(mixer, chunks):
    module, run = mixer
    x, state, got, at = inputs(), module.init_state(2, LENGTH + 1), [], 0
    for n, size in enumerate(chunks):
        part = x[:, at : at + size], ones(size)
        y, state = run(*(wide(*part, left=n) if max(chunks) > 1 else part), state, np.asarray([at, at]))
        got.append(y[:, n : n + size] if max(chunks) > 1 else y)
        at += size
    close(jnp.concatenate(got, axis=1), run(*wide(x, ones()))[0][:, :LENGTH], module)


def test_packed_equals_separate(mixer):
    module, run = mixer
    x, segments = inputs(), np.asarray([[1] * 4 + [2] * 8 + [3], [1] * 6 + [2] * 6 + [3]])
    packed = run(*wide(x, segments))[0]
    for places in ((slice(0, 4), slice(0, 6)), (slice(4, 12), slice(6, 12)), (slice(12, 13), slice(12, 13))):
        alone = jnp.stack([inputs(8, seed=4)[0].at[: p.stop - p.start].set(x[row, p]) for row, p in enumerate(places)])
        held = np.stack([np.arange(8) < p.stop - p.start for p in places]).astype(np.int32)
        found = run(*wide(alone, held))[0]
        for row, p in enumerate(places):
            close(packed[row, p], found[row, : p.stop - p.start], module)


def test_padding_changes_nothing(mixer):
    module, run = mixer
    x, newest = inputs(), inputs(1, seed=2)
    expected = run(*wide(x, ones()))[0][:, :LENGTH]
    longer = run(*wide(jnp.concatenate([x, newest], axis=1), ones(LENGTH + 1)))[0]
    for left in ((0, 2), (5, 3)):
        given = wide(x, ones(), left)
        y, (found, state) = run(*given)[0], run(*given, module.init_state(2, LENGTH + 1), np.asarray([0, 0]))
        after, _ = run(newest, ones(1), state, np.asarray([LENGTH, LENGTH]))
        for row, n in enumerate(left):
            close(y[row, n : n + LENGTH], expected[row], module)
            close(found[row, n : n + LENGTH], expected[row], module)
        close(after[:, 0], longer[:, LENGTH], module)


def test_rows_of_different_lengths_decode_together(mixer):
    module, run = mixer
    x, segments = inputs(), np.asarray([[1] * 6 + [0] * 7, [0] * 4 + [1] * 9])
    _, state = run(*wide(x, segments), module.init_state(2, LENGTH + 1), np.asarray([0, 0]))
    step = inputs(1, seed=3)
    together, _ = run(step, ones(1), state, np.asarray([6, 9]))
    rows = [jnp.concatenate([x[row, a:b], step[row], x[row, : 9 - (b - a)]]) for row, (a, b) in enumerate(((0, 6), (4, 13)))]
    held = np.stack([np.arange(10) < 7, np.arange(10) < 10]).astype(np.int32)
    alone = run(*wide(jnp.stack(rows), held))[0]
    close(together[:, 0], jnp.stack([alone[0, 6], alone[1, 9]]), module)


def test_the_future_is_not_seen(mixer):
    _, run = mixer
    x = inputs()
    before = run(*wide(x, ones()))[0]
    for places in ((0, 1), (6, 9), (11, 12)):
        after = run(*wide(x.at[np.arange(2), places].add(1.0), ones()))[0]
        for row, t in enumerate(places):
            np.testing.assert_array_equal(before[row, :t], after[row, :t])
            assert t > 9 or np.any(before[row, t:LENGTH] != after[row, t:LENGTH])


def test_gradients_are_finite_and_reach_every_parameter(mixer):
    module, _ = mixer
    x, segments = wide(inputs(), np.asarray([[1] * 8 + [2] * 5, [1] * 13]), left=(1, 0))

    def loss(module, x):
        return jnp.square(module(x, batch_of(segments))[0]).sum()

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(module, x)):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), path
