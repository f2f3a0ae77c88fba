"""The KV cache: a pass finds what is held, whatever holds it; tokens leave full precision and slots as they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.mask import Sink, Window
from lcx.cache.cache import At
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.plain import Plain
from lcx.cache.codecs.scaled import Fp8, Int8
from lcx.cache.kv_cache import KVCache
from lcx.cache.kv_state import whole_tiles
from lcx.cache.policies.cam import CaM
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.policy import Policy
from lcx.cache.policies.simlayerkv import SimLayerKV
from lcx.cache.policies.think import ThinK
from lcx.cache.scorers.compactor import Compactor
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.observed import Observed
from lcx.cache.scorers.snapkv import SnapKV
from lcx.parts import parts
from lcx.positions.alibi import ALiBi
from lcx.positions.rotate import rotate
from lcx.spec import SpecError
from tests.cache.driven import DIM, FREQUENCIES, HEADS, KV_HEADS, VALUE, expected, held_indices, passes, run, step

CODECS = {"plain": Plain(), "int8": Int8(), "fp8": Fp8(), "int4": IntGroups(group=2), "kivi": KIVI(group=2, residual=5)}
POLICIES = {
    "all": None,
    "norm": Evict(score=KeyNorm(), keep=24, every=4, sinks=2, recent=3),
    "snap": Evict(score=SnapKV(window=3, kernel=3), keep=0.5, every=8, heads="shared"),
    "prefill": Evict(score=KeyNorm(), keep=0.25, scope="prefill", every=16),
    "decode": Evict(score=KeyNorm(), keep=30, scope="decode", every=2, heads="shared"),
}
LENGTHS = [40, 1, 1, 40, *[1] * 9]


def close(found, wanted, atol=3e-6):
    np.testing.assert_allclose(found[0], wanted[0], atol=atol)
    np.testing.assert_allclose(found[1], wanted[1], atol=atol)


PAIRS = [("kivi", "snap"), ("int8", "norm"), ("int4", "decode"), ("fp8", "prefill"), ("kivi", "all"), ("plain", "norm")]


@pytest.mark.parametrize(
    "codec, policy", [pytest.param(*pair, marks=pytest.mark.slow if n > 2 else ()) for n, pair in enumerate(PAIRS)]
)
def test_a_pass_finds_what_is_held(codec, policy):
    codec, policy = CODECS[codec], POLICIES[policy]
    keys = "raw" if policy is None or policy.by_head else "rotated"
    compare = lambda state, q, k, v, info, out, lse, before: close((out, lse), expected(q, k, v, info, before))
    state = run(KVCache(codec=codec, policy=policy, keys=keys), passes(LENGTHS, padding=7), each=compare)
    assert state.overflow.tolist() == [0, 0] and state.seen.tolist() == [sum(LENGTHS) - 7, sum(LENGTHS)]


@pytest.mark.parametrize(
    "heads, options",
    [
        ("own", {"mask": Sink(size=2) | Window(size=9)}),
        pytest.param("shared", {"bias": ALiBi()}, marks=pytest.mark.slow),
        pytest.param("own", {"softcap": 3.0}, marks=pytest.mark.slow),
    ],
    ids=["mask", "bias", "soft-cap"],
)
def test_masks_biases_and_soft_caps_are_those_of_attention(heads, options):
    cache = KVCache(codec=Int8(), policy=Evict(score=SnapKV(window=4, kernel=1), keep=20, heads=heads))
    check = lambda state, q, k, v, info, out, lse, before: close((out, lse), expected(q, k, v, info, before, **options))
    run(cache, passes([30, 1, 12, 1]), each=check, **options)


def test_tokens_wait_in_full_precision():
    """Of 80 tokens and 5 to stay behind, two blocks of 32 are coded; the 16 others are as they came."""
    codec, given = KIVI(group=32, residual=5), list(passes([50, 30]))
    state = run(KVCache(codec=codec, keys="raw"), given)
    k = jnp.concatenate([k for _, k, _, _ in given], axis=1)
    v = jnp.concatenate([v for _, _, v, _ in given], axis=1)
    by_head = lambda x: jnp.moveaxis(x[:, :64], 1, 2)
    assert state.used.tolist() == [[64], [64]]
    for coder, codes, x in ((codec.keys, state.held.k, k), (codec.values, state.held.v, v)):
        wanted = coder.encode(by_head(x))
        for found, leaf in zip(jax.tree.leaves(codes), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(found[:, :, : leaf.shape[2]], leaf)
    np.testing.assert_array_equal(state.waiting.k[:, :16], k[:, 64:])
    np.testing.assert_array_equal(state.waiting.v[:, :16], v[:, 64:])
    assert np.asarray(state.waiting.info.segments).sum() == 32


@pytest.mark.parametrize("codec", [CODECS[name] for name in ("plain", "kivi")], ids=["plain", "kivi"])
def test_passes_of_any_size_hold_the_same(codec):
    """Without a policy what is held depends on the tokens alone."""
    whole = [
        jnp.concatenate(x, axis=1) if isinstance(x[0], jax.Array) else x
        for x in zip(*[g[:3] for g in passes([70])], strict=True)
    ]
    info = next(iter(passes([70])))[3]
    cut = lambda sizes: [
        (*(x[:, a:b] for x in whole), info.take(slice(a, b)))
        for a, b in zip(np.cumsum([0, *sizes[:-1]]), np.cumsum(sizes), strict=True)
    ]
    states = [run(KVCache(codec=codec), cut(sizes)) for sizes in ([70], [64, *[1] * 6])]
    for state in states[1:]:
        for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=1e-6)


def test_keys_of_small_norm_stay():
    given = list(passes([60]))
    state = run(KVCache(policy=Evict(score=KeyNorm(), keep=16, sinks=2, recent=4)), given)
    norms = np.linalg.norm(given[0][1], axis=-1)
    for b, heads in enumerate(held_indices(None, state)):
        for h, found in enumerate(heads):
            others = np.argsort(norms[b, 2:56, h], kind="stable")[:10] + 2
            assert found == sorted({0, 1, *range(56, 60), *others.tolist()})


def test_a_share_grows_with_what_was_read():
    counts = []
    note = lambda state, *_: counts.append((np.asarray(state.held.info.segments) != 0).sum(axis=2).tolist())
    run(KVCache(policy=Evict(score=KeyNorm(), keep=0.25)), passes([40, 20, 20]), each=note)
    assert [one[1] for one in counts] == [[10, 10], [15, 15], [20, 20]]


def test_decoding_drops_when_the_slots_behind_the_budget_are_full():
    counts = []
    note = lambda state, *_: counts.append(int((np.asarray(state.held.info.segments[1, 0]) != 0).sum()))
    run(KVCache(policy=Evict(score=KeyNorm(), keep=10, every=3)), passes([12, *[1] * 8]), each=note)
    assert counts == [10, 11, 12, 13, 10, 11, 12, 13, 10]


def test_after_a_prefill_alone_answers_need_room():
    cache = KVCache(policy=Evict(score=KeyNorm(), keep=10, scope="prefill", every=3))
    assert run(cache, passes([20, 1, 1, 1])).overflow.tolist() == [0, 0]
    assert run(cache, passes([20, 1, 1, 1, 1])).overflow.tolist() == [1, 1]


def test_blocks_leave_an_answer_its_room():
    """What stays of a prompt fills its last block in part; the answer begins another."""
    cache = KVCache(codec=IntGroups(group=2), policy=Evict(score=KeyNorm(), keep=33, scope="prefill", every=16))
    state = run(cache, passes([95, *[1] * 16]), length=128)
    assert state.overflow.tolist() == [0, 0] and state.held.info.index.max() == 95


@pytest.mark.parametrize(
    ("slots", "multiple", "held"), [(1000, 32, 1024), (1025, 1, 1152), (1025, 32, 1152), (1500, 100, 1500), (26000, 100, 28800)]
)
def test_many_slots_are_whole_tiles_where_that_adds_few(slots, multiple, held):
    assert whole_tiles(slots, multiple) == held


def test_slots_side_by_side():
    """Held keys stand right before the newest tokens: what a query finds is what it finds in a text of those tokens alone."""
    cache = KVCache(policy=Evict(score=KeyNorm(), keep=8, heads="shared", recent=8), keys="raw", positions="slots")
    given = list(passes([30, 1]))
    state = run(cache, given[:1])
    assert held_indices(cache, state) == [[list(range(22, 30))]] * 2
    shifted = dataclasses.replace(cache, policy=dataclasses.replace(cache.policy, recent=4, sinks=4))
    found = []
    run(shifted, given, each=lambda state, q, k, v, info, out, lse, before: found.append((out, lse, before)))
    out, lse, (_, values, info) = found[1]
    (_, k, _, _), (q, new_k, new_v, new_info) = given
    kept = [0, 1, 2, 3, 26, 27, 28, 29]
    places = lambda index: jnp.broadcast_to(jnp.asarray(index, jnp.float32)[None, :, None], (2, len(index), 1))
    held = rotate(k[:, jnp.asarray(kept)], places(range(22, 30)), FREQUENCIES, side="key")
    wanted = expected(q, new_k, new_v, new_info, (held, values[:, :8], jax.tree.map(lambda x: x[:, :8], info)))
    close((out, lse), wanted)


def test_attention_received_is_what_queries_gave_slots_side_by_side():
    """Each query of the two of a group gives 1, wherever slots stand."""
    cache = KVCache(policy=Evict(score=Observed(), keep=12, heads="shared"), keys="raw", positions="slots")
    total = []

    def each(state, *_):
        there = np.asarray(state.held.info.segments) != 0
        total.append(np.where(there, np.asarray(state.held.marks), 0).sum(axis=2))

    run(cache, passes([60, 1, 1, 1, 1]), each=each)
    np.testing.assert_allclose(np.diff(total, axis=0), 2, atol=1e-4)


def test_what_always_stays_counts_to_the_budget():
    with pytest.raises(SpecError, match=r"recent = 12: expected 0 or more tokens, at most 8, or keep of at least 14"):
        Evict(score=KeyNorm(), keep=10, sinks=2, recent=12)
    with pytest.raises(SpecError, match=r"recent = 32: expected 0 or more tokens, at most 25, or keep of at least 37"):
        Chelsea(keep=30)


def test_what_needs_raw_keys_says_so():
    with pytest.raises(SpecError, match="keys = 'rotated': expected 'raw' beside positions = 'slots'"):
        KVCache(positions="slots")
    with pytest.raises(SpecError, match="keys = 'raw': expected 'rotated', which policy = ThinK"):
        KVCache(keys="raw", policy=ThinK())
    with pytest.raises(SpecError, match=r"positions = 'slots': expected 'own' beside policy = Evict.*distances"):
        KVCache(keys="raw", positions="slots", policy=Evict(score=SnapKV(), keep=8))


@pytest.mark.slow
def test_streaming_heads_keep_streaming():
    """In decoding too: of two heads one holds all, the other its first and newest, with `every` more at most."""
    cache = KVCache(policy=DuoAttention(gates=((0.9, 0.1),), sinks=2, recent=5, every=2))
    counts = []

    def check(state, q, k, v, info, out, lse, before):
        close((out, lse), expected(q, k, v, info, before))
        held, seen = held_indices(cache, state)[1], int(state.seen[1])
        assert held[0] == [*range(seen)] and held[1] == [0, 1, *range(seen - len(held[1]) + 2, seen)]
        counts.append(len(held[1]))

    state = run(cache, passes([12, *[1] * 6, 12, 1], padding=3), each=check)
    assert counts == [7, 8, 9, 7, 8, 9, 7, 7, 8] and state.overflow.tolist() == [0, 0]


def test_layers_that_only_stream_have_slots_for_no_more():
    policy = DuoAttention(gates=((0.1, 0.2), (0.9, 0.8)), sinks=2, recent=5, every=2)
    init = lambda layer: KVCache(policy=policy).init(
        1, 96, KV_HEADS, DIM, DIM, jnp.float32, at=At(layer=layer, depth=2, heads=4)
    )
    assert [init(layer).held.k.shape[2] for layer in (0, 1)] == [9, 96]
    one = KVCache(policy=dataclasses.replace(policy, gates=((0.1, 0.2),), streaming=1.0))
    state = run(one, passes([12, 1, 1, 1]))
    assert held_indices(one, state)[0] == [[0, 1, *range(10, 15)]] * 2 and state.overflow.tolist() == [0, 0]


CHOICES = {
    "compactor": Evict(score=Compactor(sketch=4, chunk=8, sinks=2, recent=2), keep=8),
    "think": ThinK(channels=0.4, window=6, score=KeyNorm(), keep=8),
    "lazy": SimLayerKV(threshold=0.4, sinks=1, recent=8),
    "cam": CaM(score=SnapKV(window=3, kernel=3), keep=8, window=4),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if n else ()) for n, name in enumerate(CHOICES)])
def test_padding_is_no_part_of_a_choice(name):
    policy = CHOICES[name]
    cache = KVCache(policy=policy, keys="raw" if policy.raw else "rotated")
    ((q, k, v, info),) = passes([24], padding=7)
    found = run(cache, [(q, k, v, info)]).held
    wanted = run(cache, [(*(x[:, 7:] for x in (q, k, v)), info.take(slice(7, 24)))]).held
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a[0], np.float64), np.asarray(b[0], np.float64), atol=2e-6)


@pytest.mark.parametrize("cls", parts(Policy), ids=lambda cls: cls.__name__)
def test_every_policy_holds_no_more_than_it_says(cls):
    for policy in list(cls.examples())[:1]:
        cache = KVCache(policy=policy, keys="rotated" if policy.rotated else "raw")
        slots = policy.slots(96, 1.0)

        def check(state, *_, slots=slots):
            held = np.asarray(state.held.info.segments) != 0
            assert held.shape[2] == slots and (held.sum(axis=2) <= slots).all()
            assert (held[..., 1:] <= held[..., :-1]).all(), "slots in front are taken first"

        run(cache, passes([40, 1, 40, 1, 1]), each=check)


@pytest.mark.parametrize("codec", [Plain(), Int8(), KIVI(group=8, residual=8)], ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("cls", parts(Policy), ids=lambda cls: cls.__name__)
def test_bfloat16_is_held_as_such(cls, codec):
    """By every policy, whatever it moves: a state has the types and shapes that it had before a pass."""
    policy = cls.examples()[0]
    cache = KVCache(codec=codec, policy=policy, keys="rotated" if policy.rotated else "raw")
    begin = lambda: cache.init(2, 96, KV_HEADS, DIM, VALUE, jnp.bfloat16, at=At(heads=HEADS))
    wanted = jax.eval_shape(begin)
    assert codec != Plain() or wanted.held.k.dtype == wanted.waiting.k.dtype == jnp.bfloat16
    for q, k, v, info in passes([40, 1]):
        given = [x.astype(jnp.bfloat16) for x in (q, k, v)]
        found = jax.eval_shape(lambda given=given, info=info: step(cache, begin(), *given, info)[0])
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        assert jax.tree.leaves(found) == jax.tree.leaves(wanted)
