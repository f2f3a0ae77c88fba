"""The TPU kernels, interpreted, equal the float32 reference in value and gradient: masks, tokens, shards, tile lists."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import arrays, beside_the_reference, compare, random_tokens, whole_document, with_gradient

from lcx.attention.mask import Beyond, Causal, Chunk, Hide, Sink, Window, Within
from pallas_kernels.tile_attention import reference, tile_list, tpu
from pallas_kernels.tile_attention.blocks import Blocks, Shape, choose_blocks, footprint, stacked_heads
from pallas_kernels.tile_attention.tile_list import FIRST, KIND, LAST, MAJOR, MINOR, TileList, from_list, from_states
from pallas_kernels.tile_attention.tiling import EMPTY, FULL, PARTIAL
from pallas_kernels.tile_attention.tokens import Tokens
from pallas_kernels.tpu_chips import VMEM

SMALL = Blocks.same(128, 128)
KINDS = ("packed", "special", "shuffled", "padding", "single", "single")


def both(mask, softcap=None, **options):
    return beside_the_reference(tpu, mask, softcap, **{"blocks": SMALL, **options})


@pytest.mark.parametrize(
    "mask, heads, widths, softcap, blocks",
    [
        (Causal(), (2, 2), (64, 64), None, SMALL),
        (Window(size=90) | (Sink(size=3) & Hide(query_role=1, key_role=0)), (4, 2), (128, 40), 2.0, SMALL),
        (Within(size=200) & Chunk(size=120), (4, 1), (40, 64), None, Blocks((256, 128), (128, 256), (128, 384))),
        (Beyond(size=30), (2, 1), (192, 128), None, SMALL),
    ],
    ids=["causal", "window or sink", "chunk", "beyond"],
)
def test_equals_the_reference(mask, heads, widths, softcap, blocks):
    """Lengths that are no multiple of a tile, heads alone, in pairs and in fours, widths that need padding and do not."""
    tiled, dense = both(mask, softcap, blocks=blocks)
    hidden = 0
    for seed, kind in enumerate(KINDS):
        rng = np.random.default_rng(seed)
        given = *arrays(rng, 2, 201, 299, *heads, *widths), random_tokens(rng, 2, 201, kind), random_tokens(rng, 2, 299, kind)
        got = tiled(*given)
        compare(got, dense(*given), 3e-6)
        nothing = np.isneginf(got[1])
        assert not np.asarray(got[0])[nothing].any() and not np.asarray(got[2])[nothing].any()
        hidden += nothing.sum()
    assert hidden > 0


def test_full_and_empty_tiles_at_positions_of_a_million():
    """One document: tiles below the diagonal are full. NaN stands where no query looks: what is not read does no harm."""
    rng = np.random.default_rng(0)
    given = arrays(rng, 1, 384, 384, 2, 1, 64, 64)
    tokens = Tokens(*(x + 1_000_000 for x in whole_document(1, 384)[:2]), *whole_document(1, 384)[2:])
    tiled, dense = both(Causal())
    compare(tiled(*given, tokens, tokens), dense(*given, tokens, tokens), 3e-6)
    q, k, v, *cotangents = given
    k, v = (x.at[:, 256:].set(jnp.nan) for x in (k, v))
    early = tokens._replace(order=jnp.minimum(tokens.order, 1_000_255), segments=tokens.segments.at[:, 256:].set(0))
    out, _, dq, dk, dv = tiled(q, k, v, *cotangents, early, tokens)
    assert all(np.isfinite(x).all() for x in (out, dq, dk[:, :256], dv[:, :256]))
    assert not dk[:, 256:].any() and not dv[:, 256:].any()


def test_bfloat16_is_within_two_percent():
    rng = np.random.default_rng(0)
    tiled, dense = both(Causal())
    q, k, v, *rest = *arrays(rng, 2, 201, 201, 4, 2, 64, 64, jnp.bfloat16), *(random_tokens(rng, 2, 201, "packed"),) * 2
    got = tiled(q, k, v, *rest)
    assert [x.dtype for x in got] == [jnp.float32] * 2 + [jnp.bfloat16] * 3
    compare(got, dense(*(x.astype(jnp.float32) for x in (q, k, v)), *rest), 2e-2)


def test_gradients_of_shards_of_keys_add_up():
    """Each half of the keys is given the lse of both, as a ring gives it; some rows see nothing in one half."""
    rng = np.random.default_rng(0)
    q, k, v, d_out, d_lse = arrays(rng, 2, 130, 256, 2, 1, 64, 64)
    q_tokens, k_tokens = random_tokens(rng, 2, 130, "special"), random_tokens(rng, 2, 256, "special")
    options = {"mask": Causal(), "scale": 0.2}
    out, lse, *expected = with_gradient(functools.partial(reference.forward, **options))(
        q, k, v, d_out, d_lse, q_tokens, k_tokens
    )
    delta = jnp.sum(d_out * out, axis=-1) - jnp.where(jnp.isneginf(lse), 0, d_lse)
    run = jax.jit(functools.partial(tpu.backward, **options, blocks=SMALL, interpret=True))
    halves = []
    for half in (slice(0, 128), slice(128, 256)):
        part = Tokens(*(field[:, half] for field in k_tokens))
        halves.append(run(q, k[:, half], v[:, half], q_tokens, part, lse, delta, d_out))
    (dq, dk, dv), (dq_2, dk_2, dv_2) = halves
    got = out, lse, dq + dq_2, jnp.concatenate([dk, dk_2], 1), jnp.concatenate([dv, dv_2], 1)
    compare(got, (out, lse, *expected), 3e-6)


def test_a_list_of_tiles_for_every_key_head():
    """Key head 1 leaves out the second tile of its keys, which a reference without those keys leaves out too."""
    rng = np.random.default_rng(0)
    given = arrays(rng, 1, 201, 299, 4, 2, 64, 64)
    q_tokens, k_tokens = random_tokens(rng, 1, 201, "special"), random_tokens(rng, 1, 299, "special")
    places = list(itertools.product(range(2), range(3)))
    lists = rng.permutation(places), rng.permutation([place for place in places if place[1] != 1])
    padded = np.stack([np.pad(x, [(0, 6 - len(x)), (0, 0)], constant_values=77) for x in lists])[None]
    rows, cols = (jnp.asarray(padded[..., axis], jnp.int32) for axis in range(2))
    tiles = TileList(rows, cols, jnp.full(rows.shape, PARTIAL, jnp.int8), jnp.asarray([[6, 4]], jnp.int32))
    tiled, dense = both(Causal(), tiles=tiles)
    without = k_tokens._replace(segments=k_tokens.segments.at[:, 128:256].set(0))
    got = tiled(*given, q_tokens, k_tokens)
    for head, seen in enumerate((k_tokens, without)):
        part = lambda x, head=head: jnp.split(x, 2, axis=2)[head]
        compare(map(part, got), dense(*map(part, given), q_tokens, seen), 3e-6)


def test_stacks_that_share_a_key_head(monkeypatch):
    """Four query heads of a key head in stacks of two, as where four do not fit."""
    rng = np.random.default_rng(0)
    given = *arrays(rng, 1, 201, 201, 8, 2, 64, 64), *(random_tokens(rng, 1, 201, "special"),) * 2
    monkeypatch.setattr(tpu, "stacked_heads", lambda *_: 2)
    tiled, dense = both(Causal())
    compare(tiled(*given), dense(*given), 3e-6)


def test_long_lists_are_cut_into_ranges(monkeypatch):
    """Scalar memory for 4 tiles of 3 x 3: one range a row of tiles, the outputs joined again."""
    rng = np.random.default_rng(0)
    given = *arrays(rng, 1, 300, 300, 1, 1, 64, 64), *(random_tokens(rng, 1, 300, "special"),) * 2
    monkeypatch.setattr(tile_list, "ENTRIES", 4)
    tiled, dense = both(Causal())
    compare(tiled(*given), dense(*given), 3e-6)
    with pytest.raises(ValueError, match="2 rows of 3 x 3 tiles: a list holds 4 tiles"):
        jax.eval_shape(tiled, *jax.tree.map(lambda x: jnp.concatenate([x, x]), given))


def entries_of(packed, count):
    packed = np.asarray(packed)[:count]
    return packed >> MAJOR, packed >> MINOR & (1 << (MAJOR - MINOR)) - 1, packed & KIND, packed & FIRST > 0, packed & LAST > 0


def test_entries_of_a_list():
    """In the order of rows, ends marked, a row of nothing with one empty entry, the tail repeats the end without work."""
    states = jnp.asarray([[[EMPTY, PARTIAL, EMPTY], [EMPTY] * 3, [FULL, EMPTY, PARTIAL]], [[EMPTY] * 3] * 3], jnp.int32)
    packed, longest = from_states(states)
    assert longest == 4 and packed.shape == (2, 1, 9)
    expected = [[0, 1, PARTIAL, 1, 1], [1, 0, EMPTY, 1, 1], [2, 0, FULL, 1, 0], [2, 2, PARTIAL, 0, 1]]
    np.testing.assert_array_equal(np.stack(entries_of(packed[0, 0], 4), 1), expected)
    np.testing.assert_array_equal(np.stack(entries_of(packed[1, 0], 3), 1), [[row, 0, EMPTY, 1, 1] for row in range(3)])
    assert (packed[0, 0, 4:] == (2 << MAJOR | 2 << MINOR | EMPTY)).all()
    rows, cols, kind = (jnp.asarray([[x]], jnp.int32) for x in ([2, 0, 2, 9], [2, 1, 0, 9], [PARTIAL, PARTIAL, FULL, FULL]))
    given = TileList(rows, cols, kind.astype(jnp.int8), jnp.asarray([[3]], jnp.int32))
    np.testing.assert_array_equal(from_list(given, 3).packed[0, 0, :4], packed[0, 0, :4])


@pytest.mark.parametrize("T, S", [(0, 5), (5, 0)])
def test_nothing_to_attend(T, S):
    q, k, v, d_out, d_lse = arrays(np.random.default_rng(0), 1, T, S, 2, 1, 4, 3)
    tokens = whole_document(1, T), whole_document(1, S)
    out, lse = tpu.forward(q, k, v, *tokens, mask=Causal(), scale=1.0)
    assert out.shape == (1, T, 2, 3) and not out.any() and np.isneginf(lse).all()
    grads = tpu.backward(q, k, v, *tokens, lse, d_lse, d_out, mask=Causal(), scale=1.0)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, (q, k, v), strict=True))


def test_what_does_not_fit_is_named():
    q, k, v, *_ = arrays(np.random.default_rng(0), 1, 5, 5, 2, 1, 4, 3)
    call = functools.partial(tpu.forward, mask=Causal(), scale=1.0)
    tokens = whole_document(1, 5), whole_document(1, 5)
    with pytest.raises(ValueError, match="float32, bfloat16, float32: expected one"):
        call(q, k.astype(jnp.bfloat16), v, *tokens)
    with pytest.raises(ValueError, match="tiles with blocks = None"):
        call(
            q,
            k,
            v,
            *tokens,
            tiles=TileList(
                *(jnp.zeros((1, 1, 1), jnp.int32),) * 2, jnp.zeros((1, 1, 1), jnp.int8), jnp.ones((1, 1), jnp.int32)
            ),
        )
    with pytest.raises(ValueError, match=r"forward = \(4096, 4096\) with 2 stacked heads of 4 and 3 in float32 takes"):
        call(q, k, v, *tokens, blocks=Blocks.same(4096, 4096))
    with pytest.raises(ValueError, match=r"key_gradient = \(128, 100\): expected multiples of 128"):
        Blocks((128, 128), (128, 128), (128, 100))


@pytest.mark.parametrize("chip", [None, *VMEM])
def test_chosen_blocks_fit(chip):
    for G, D, dtype in itertools.product((1, 4, 24, 71), (64, 128, 256), (jnp.bfloat16, jnp.float32)):
        G = stacked_heads(Shape(1, 1, G, D, D), dtype, chip)
        blocks = choose_blocks(Shape(100_000, 100_000, G, D, D), dtype, chip)
        assert footprint(blocks, G, D, D, dtype) <= 7 / 8 * VMEM[chip or "v4"]
        assert choose_blocks(Shape(100_000, 100_000, G, D, D), dtype, chip, blocks) == blocks
    assert choose_blocks(Shape(1, 300, 1, 64, 64), jnp.bfloat16, "v5e") == Blocks.same(128, 384)
    with pytest.raises(ValueError, match="128 stacked heads of 256 and 256 in float32 takes"):
        choose_blocks(Shape(5, 5, 128, 256, 256), jnp.float32, "v4")
