"""Layouts are permutations that balance causal work, and everything but what reads neighbours works on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.balance import Balance, balance, shard_pairs
from lcx.attention.mask import Causal, Chunk, Sink, Window, Within, tokens_of
from lcx.batch import Batch, causal_info
from lcx.mixers.mixer import Inherited, Mixer
from lcx.parallel.layout import Contiguous, Layout, Striped, Zigzag
from lcx.parallel.rules import Rules
from lcx.parts import parts
from lcx.positions.rope import Rope
from lcx.spec import SpecError

LAYOUTS = [layout for cls in parts(Layout) for layout in cls.examples()]


@pytest.mark.parametrize(
    "layout, shards, expected",
    [
        (Contiguous(), 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        (Zigzag(), 2, [0, 1, 6, 7, 2, 3, 4, 5]),
        (Zigzag(), 4, [0, 7, 1, 6, 2, 5, 3, 4]),
        (Striped(), 4, [0, 4, 1, 5, 2, 6, 3, 7]),
        (Striped(granularity=2), 2, [0, 1, 4, 5, 2, 3, 6, 7]),
    ],
)
def test_which_token_lies_where(layout, shards, expected):
    assert layout.permutation(8, shards).tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_is_a_permutation_of_every_array_along_the_sequence(layout):
    length, shards = 48, 4
    places = layout.permutation(length, shards)
    assert sorted(places) == list(range(length))
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length)
    batch = Batch(tokens=tokens, targets=tokens + 1, info=causal_info(np.ones_like(tokens)), side={"advantage": np.ones(2)})
    laid = layout.lay(batch, shards)
    assert (laid.tokens == tokens[:, places]).all() and (laid.targets == laid.tokens + 1).all()
    assert (laid.info.index == places).all() and (laid.info.positions[..., 0] == places).all()
    assert laid.side["advantage"].shape == (2,)


@pytest.mark.parametrize("layout, length", [(Contiguous(), 6), (Zigzag(), 12), (Striped(granularity=4), 24)])
def test_a_length_that_does_not_divide_is_refused(layout, length):
    with pytest.raises(SpecError, match=f"layout: rows of {length} tokens: expected a multiple of"):
        layout.permutation(length, 4)


def test_balance_of_causal_work():
    """One document over 8 devices: a contiguous ring waits for its last device at every step."""
    length, shards = 8 * 128, 8
    found = {}
    for layout in LAYOUTS:
        info = causal_info(np.ones((1, length), np.int32))
        laid = jax.tree.map(lambda x, layout=layout: x[:, layout.permutation(length, shards)], info)
        pairs = shard_pairs(Causal(), laid, shards)
        assert pairs.sum() == length * (length + 1) // 2
        found[str(layout)] = balance(pairs)
    contiguous = found.pop("Contiguous()")
    assert 1.85 < contiguous.devices < 1.9 and 1.85 < contiguous.steps < 2.0
    for even in found.values():
        assert even.devices < 1.05 and even.steps < 1.05
    assert balance(np.zeros((2, 2), int)) == Balance(1.0, 1.0)


def test_balance_counts_the_mask_and_the_documents():
    segments = np.repeat([[1, 2]], 8, axis=1).reshape(1, 16)
    info = causal_info(np.sort(segments))
    assert shard_pairs(Causal(), info, 2).tolist() == [[36, 0], [0, 36]]
    assert shard_pairs(Window(size=2), causal_info(np.ones((1, 8), np.int32)), 2).tolist() == [[7, 0], [1, 7]]


def test_balance_counted_from_intervals_is_that_of_the_visible_pairs():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 4, (3, 48)), axis=1)
    for mask in (Causal(), Sink(size=2) | Window(size=7), Chunk(size=5) & Within(size=4)):
        for layout in LAYOUTS:
            places = layout.permutation(48, 4)
            laid = jax.tree.map(lambda x, places=places: x[:, places], causal_info(segments))
            tokens = tokens_of(laid)
            seen = np.asarray(mask.visible(tokens.rows(), tokens.columns())).reshape(3, 4, 12, 4, 12).sum(axis=(0, 2, 4))
            np.testing.assert_array_equal(shard_pairs(mask, laid, 4), seen)


MIXERS = [mixer for cls in parts(Mixer) if not cls.sequential for mixer in cls.examples()]


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_a_mixer_that_reads_no_neighbours_works_on_any_layout(mixer):
    """Permute a packed batch: the outputs are permuted, and so are the gradients."""
    inherited = Inherited(width=16, depth=1, rope=Rope(), compute="float32", rules=Rules())
    module = mixer.build(inherited, rngs=nnx.Rngs(0))
    segments = np.asarray([[1] * 9 + [2] * 12 + [0] * 3, [0] * 2 + [1] * 22])
    batch = Batch(tokens=np.zeros_like(segments, np.int32), info=causal_info(segments))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 16)), jnp.float32)

    @jax.jit
    def run(x, batch):
        y, pull = jax.vjp(lambda x: module(x, batch)[0], x)
        return y, pull(jnp.sin(y))[0]

    straight = run(x, batch)
    for layout in LAYOUTS:
        places = layout.permutation(24, 2)
        for got, wanted in zip(run(x[:, places], layout.lay(batch, 2)), straight, strict=True):
            np.testing.assert_allclose(got, wanted[:, places], atol=2e-6)
