"""The mask algebra against loops over pairs: what is visible, what a tile may be, how many pairs there are."""

import jax.numpy as jnp
import numpy as np
import pytest
from infos import info, random_info

from lcx.attention.count import document_pairs, visible_pairs
from lcx.attention.mask import Ahead, And, Beyond, Causal, Chunk, ChunksBack, Hide, Mask, Or, Sink, Window, Within, tokens_of
from lcx.parts import parts
from lcx.spec import SpecError
from pallas_kernels.tile_attention.tokens import Tokens, tiles

MASKS = [(f"{cls.__name__}-{n}", spec) for cls in parts(Mask) for n, spec in enumerate(cls.examples())]
each_mask = pytest.mark.parametrize("mask", [mask for _, mask in MASKS], ids=[name for name, _ in MASKS])
each_kind = pytest.mark.parametrize("kind", ["packed", "special", "mixed"])


def term(mask, q, k):
    """Whether the term lets a pair (index, role) through, in plain Python."""
    (i, qr), (j, kr) = q, k
    match mask:
        case Causal():
            return True
        case Window(size=n):
            return -n < i - j < n
        case Sink(size=n):
            return j < n
        case Chunk(size=n):
            return i // n == j // n
        case Within(size=n):
            return i - j < n
        case Beyond(size=n):
            return i - j >= n
        case Ahead(size=n):
            return j - i >= n
        case ChunksBack(size=n, farther=farther):
            return i // n - j // n >= 2 if farther else i // n - j // n == 1
        case Hide(query_role=a, key_role=b):
            return not (qr == a and kr == b)
        case And(terms=terms):
            return all(term(t, q, k) for t in terms)
        case Or(terms=terms):
            return any(term(t, q, k) for t in terms)
    raise AssertionError(f"{mask} has no restatement here")


def by_pairs(mask, q_info, k_info):
    q, k = (np.stack([np.asarray(f) for f in tokens_of(side)], axis=-1) for side in (q_info, k_info))
    dense = np.zeros((q.shape[0], q.shape[1], k.shape[1]), bool)
    for b, t, s in np.ndindex(dense.shape):
        (qi, qo, qs, qr), (ki, ko, ks, kr) = q[b, t], k[b, s]
        same = qs == ks or ks == -1 or qs == -2
        dense[b, t, s] = qs != 0 and ks != 0 and same and ko <= qo and term(mask, (qi, qr), (ki, kr))
    return dense


def test_every_mask_has_examples():
    assert all(cls.examples() for cls in parts(Mask))


@each_mask
@each_kind
def test_visible_pairs_and_tiles(mask, kind):
    rng = np.random.default_rng(3)
    q_info, k_info = random_info(rng, 2, 24, kind), random_info(rng, 2, 30, kind)
    expected = by_pairs(mask, q_info, k_info)
    q, k = tokens_of(q_info), tokens_of(k_info)
    assert np.array_equal(mask.visible(q.rows(), k.columns()), expected)
    assert visible_pairs(mask, q_info, k_info).tolist() == expected.sum(axis=(1, 2)).tolist()
    for rows, columns in ((1, 1), (4, 5), (8, 15), (24, 30)):
        may, must = mask.bounds(tiles(q, rows).rows(), tiles(k, columns).columns())
        cut = expected.reshape(2, 24 // rows, rows, 30 // columns, columns)
        assert not (cut.any(axis=(2, 4)) & ~np.asarray(may)).any()
        assert not (np.asarray(must) & ~cut.all(axis=(2, 4))).any()
        if rows == columns == 1 and kind == "packed":
            assert np.array_equal(may, cut.any(axis=(2, 4)))  # a tile of one pair leaves no doubt


@each_mask
def test_counts_of_packed_rows(mask):
    own = random_info(np.random.default_rng(5), 3, 41)
    assert visible_pairs(mask, own, own).tolist() == by_pairs(mask, own, own).sum(axis=(1, 2)).tolist()
    whole = info(np.arange(41)[None], np.ones((1, 41)))
    assert document_pairs(mask, 41) == by_pairs(mask, whole, whole).sum()


@each_mask
def test_nothing_is_seen_beyond_the_reach(mask):
    """Of a document of 200 tokens each sees as far back as the mask reaches, and some token that far unless terms meet."""
    index, roles = np.arange(200), np.zeros(200, int)
    q, k = (Tokens(x, x, x * 0 + 1, r) for x, r in ((index[:, None], roles[:, None]), (index[None], roles[None])))
    rows, columns = np.nonzero(np.broadcast_to(mask.visible(q, k), (200, 200)))
    farthest = (rows - columns).max(initial=-1) + 1
    assert mask.reach is None or farthest <= mask.reach
    if isinstance(mask, Window | Within | Chunk | ChunksBack) and mask.reach is not None:
        assert farthest == mask.reach


def test_the_reach_of_masks_that_meet():
    assert (Window(size=7) & Chunk(size=4)).reach == 4 and (Window(size=7) | Chunk(size=4)).reach == 7
    assert (Window(size=7) & Sink(size=2)).reach == 7 and (Window(size=7) | Sink(size=2)).reach is None


def test_counts_at_full_length_by_formula():
    n, w = 1_000_000, 4096
    assert document_pairs(Causal(), n) == n * (n + 1) // 2
    assert document_pairs(Window(size=w), n) == w * (w + 1) // 2 + (n - w) * w
    assert document_pairs(Sink(size=4) | Window(size=w), n) == document_pairs(Window(size=w), n) + sum(
        min(4, max(0, i - w + 1)) for i in range(w + 4)
    ) + 4 * (n - w - 4)


def test_contiguous_causal_tiles_are_decided_exactly():
    """Above the diagonal empty, below it full: a kernel that trusts the bounds does half of the work."""
    whole = tokens_of(info(np.arange(64)[None], np.ones((1, 64))))
    may, must = Causal().bounds(tiles(whole, 8).rows(), tiles(whole, 8).columns())
    assert np.array_equal(may[0], np.tril(np.ones((8, 8), bool)))
    assert np.array_equal(must[0], np.tril(np.ones((8, 8), bool), -1))


def test_within_and_beyond_split_every_pair():
    rng = np.random.default_rng(0)
    own = random_info(rng, 2, 32, "mixed")
    q, k = tokens_of(own).rows(), tokens_of(own).columns()
    near, far, everything = (m.visible(q, k) for m in (Within(size=6), Beyond(size=6), Causal()))
    assert not (near & far).any() and jnp.array_equal(near | far, everything)


def test_impossible_masks_are_refused():
    with pytest.raises(SpecError, match=r"Window\.size = 0: expected at least 1 token"):
        Window(size=0)
    with pytest.raises(SpecError, match=r"Hide\.key_role = 128"):
        Hide(query_role=0, key_role=128)


def test_empty_tiles_are_never_visible():
    nothing = Tokens(*(jnp.zeros((1, 8), jnp.int32) for _ in range(4)))
    for _, mask in MASKS:
        may, must = mask.bounds(tiles(nothing, 4).rows(), tiles(nothing, 4).columns())
        assert not may.any() and not must.any()
