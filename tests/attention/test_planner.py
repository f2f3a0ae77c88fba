"""Closed forms of the planner against numbers worked out by hand, and the choices that follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lcx.attention import planner
from lcx.attention.all_gather import AllGather
from lcx.attention.balance import Balance, balance, shard_pairs
from lcx.attention.count import document_pairs
from lcx.attention.mask import Causal, Chunk, Sink, Window, tokens_of
from lcx.attention.planner import Work, estimates, explain, link_rate, sample_balance, shards_seen
from lcx.attention.ring import Ring, hops, travel
from lcx.attention.ulysses import RingUlysses, Ulysses
from lcx.batch import causal_info
from lcx.parallel.layout import Contiguous, Striped, Zigzag
from lcx.parallel.mesh import MeshSpec

EVEN = Balance(1.0, 1.0)
WORK = Work(rows=1, length=1024, heads=8, kv_heads=2, head_dim=64, pairs=1024 * 1025 // 2)


def by_strategy(work, axes, even=EVEN, flops=1e12, link=1e9):
    return {type(one.communication): one for one in estimates(work, axes, even, flops=flops, link=link)}


def test_bytes_by_hand():
    """256 tokens a device: keys and values of 256 x 2 x 64 x 2 = 65,536 elements a shard, 16 bytes of fields a token."""
    found, keys, fields, gradients = by_strategy(WORK, {"context": 4}), 65536 * 2, 256 * 16, 65536 * 4
    assert found[AllGather].moved == 3 * (2 * (keys + fields) + gradients)
    assert found[Ring].moved == 4 * (2 * (keys + fields) + gradients) + gradients
    assert found[Ring].held == 2 * 65536 * 6 and found[AllGather].held == 4 * 65536 * 6
    q, k = 256 * 64 * 8, 256 * 64 * 4  # elements; two key heads are repeated for four devices
    rows = 256 * 8 * 4  # bytes of lse, delta
    forward, backward = 2 * q + 4 * k + 4 * q + rows, 2 * q + 4 * k + 4 * q + 2 * rows + 8 * k
    assert found[Ulysses].moved == (forward + backward) * 3 / 4 + 2 * 3 * fields
    assert found[Ulysses].held == 2 * 2 * (2 * q + 2 * k)
    assert "needs two axes" in found[RingUlysses].refused


def test_seconds_by_hand():
    compute = 14 * 64 * 8 * WORK.pairs / 4 / 1e12
    slow, fast = by_strategy(WORK, {"context": 4}), by_strategy(WORK, {"context": 4}, link=1e12)
    assert slow[Ring].seconds == pytest.approx(slow[Ring].moved / 1e9)  # the transfer is longer than the tiles
    assert fast[Ring].seconds == pytest.approx(compute)
    assert fast[AllGather].seconds == pytest.approx(compute + fast[AllGather].moved / 1e12)
    idle = by_strategy(WORK, {"context": 4}, even=Balance(1.75, 2.0), link=1e12)
    assert idle[Ring].seconds == pytest.approx(2 * compute)


def test_queries_in_two_halves():
    """A pair costs 3 products of D forward (2 of scores), 8 backward (scores, dq and dk twice); q and dq move twice."""
    two, link = dataclasses.replace(WORK, halves=2), 1e12
    once, twice = by_strategy(WORK, {"context": 4}, link=link), by_strategy(two, {"context": 4}, link=link)
    assert twice[Ring].seconds == pytest.approx(2 * 11 * 64 * 8 * WORK.pairs / 4 / 1e12)
    assert (twice[Ring].moved, twice[AllGather].moved) == (once[Ring].moved, once[AllGather].moved)
    q = 256 * 64 * 8 * 2  # bytes
    assert twice[Ulysses].moved - once[Ulysses].moved == 3 * q * 3 / 4
    assert twice[Ulysses].held - once[Ulysses].held == 2 * q


def test_rings_over_two_axes():
    found, keys, fields, gradients = by_strategy(WORK, {"fsdp": 2, "context": 4}), 65536, 128 * 16, 65536 * 2
    inner = 4 * (2 * (keys + fields) + gradients) + gradients
    assert found[Ring].moved == 2 * (2 * (keys + fields) + gradients + inner) + gradients
    q, k, rows = 128 * 64 * 8, 128 * 64 * 4, 128 * 8 * 4
    exchanged = (4 * q + 8 * k + 8 * q + 3 * rows + 8 * k) * 3 / 4 + 2 * 3 * fields
    keys, fields, gradients = 2 * 512 * 64 * 2, 512 * 16, 2 * 512 * 64 * 4  # one head of the row's half
    assert found[RingUlysses].moved == exchanged + 2 * (2 * (keys + fields) + gradients) + gradients


def near(reach, shards=8):
    """Shards that see `reach` before them."""
    offset = np.arange(shards)[:, None] - np.arange(shards)
    return lambda groups: (offset >= 0) & (offset <= reach) if groups == shards else np.tri(groups, dtype=bool)


def test_rings_stop_where_nothing_is_seen():
    """Keys of a window go two places on and are dropped; their gradients, at the third place by then, jump two home."""
    keys, fields, gradients = 2 * 128 * 2 * 64 * 2, 128 * 16, 2 * 128 * 2 * 64 * 4
    windowed = estimates(WORK, {"context": 8}, EVEN, flops=1e12, link=1e9, seen=near(2))
    (ring,) = [one for one in windowed if type(one.communication) is Ring]
    assert ring.moved == 3 * (2 * (keys + fields) + gradients) + gradients
    both = lambda groups: near(3)(groups) | near(2)(groups).T  # 0, 1, 2, 3 forward, 2 backward
    (ring,) = [one for one in estimates(WORK, {"context": 8}, EVEN, flops=1e12, link=1e9, seen=both) if one.name == "Ring"]
    hops, jumps = 4 + 2, 1  # keys jump two places back
    home = 2 + 2 + 1  # gradients: three home (4 - 1), three back (4 - 1), one home
    assert ring.moved == 2 * (hops + jumps) * (keys + fields) + (hops + home) * gradients


def test_rings_in_rings_stop_where_nothing_is_seen():
    """Two by four shards that see one before them: inside, all meet by one hop and another that brings keys home; from the
    group before only the last shard is seen, by the first: three places back is one forward."""
    keys, fields, gradients = 2 * 128 * 2 * 64 * 2, 128 * 16, 2 * 128 * 2 * 64 * 4
    found = estimates(WORK, {"fsdp": 2, "context": 4}, EVEN, flops=1e12, link=1e9, seen=near(1))
    (ring,) = [one for one in found if type(one.communication) is Ring]
    each = lambda hops, home: hops * (2 * (keys + fields) + gradients) + home * gradients
    assert ring.moved == each(2, 1) + 2 * each(2, 1)


@pytest.mark.parametrize("layout", [Contiguous(), Zigzag(), Striped(granularity=8)], ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize("mask", [Causal(), Window(size=40), Chunk(size=64), Sink(size=4) | Window(size=9)], ids=repr)
def test_hops_are_those_that_rings_make(mask, layout):
    shards, length = 8, 256
    places = layout.permutation(length, shards)
    info = causal_info(np.ones((1, length), np.int32))
    tokens = jax.tree.map(lambda field: field[:, places], tokens_of(info))

    def made(tokens):
        return jnp.stack(hops(mask, tokens, tokens, "context", ("context",)))

    with jax.set_mesh(MeshSpec(context=shards).build()):
        spread, whole = PartitionSpec(None, "context"), PartitionSpec()
        wanted = jax.jit(jax.shard_map(made, in_specs=(spread,), out_specs=whole, check_vma=False))(tokens)
    assert travel(shards_seen(mask, layout, shards, length, shards)) == tuple(np.asarray(wanted))


def test_the_advice_says_why():
    pairs = document_pairs(Causal(), 1 << 20)
    million = Work(rows=1, length=1 << 20, heads=32, kv_heads=8, head_dim=128, pairs=pairs)
    found = estimates(million, {"context": 256}, EVEN, flops=197e12, link=4.5e10)
    text = explain(found, room=4 << 30)
    assert text.splitlines()[-1].startswith("advised: Ring, the fastest of")
    assert "Ulysses      refused: it shares out 32 query heads over 256 devices" in text
    assert "none holds at most 0 MiB" in explain(found, room=0)


def test_balance_is_that_of_the_layout():
    assert sample_balance(Causal(), Contiguous(), 16, 1 << 20).steps > 1.9
    assert sample_balance(Causal(), Zigzag(), 16, 1 << 20).steps < 1.01


@pytest.mark.parametrize(
    "mask, layout",
    [(Causal(), Striped(granularity=32)), (Chunk(size=512), Contiguous()), (Window(size=700) | Sink(size=4), Zigzag())],
)
def test_balance_is_that_of_the_whole_row(mask, layout):
    """Of all queries, and of some at even distances."""
    shards, length = 16, 1 << 13
    info, places = causal_info(np.ones((1, length), np.int32)), layout.permutation(length, shards)
    moved = dataclasses.replace(info, index=info.index[:, places], order=info.order[:, places])
    wanted = balance(shard_pairs(mask, moved, shards))
    assert sample_balance(mask, layout, shards, length) == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "SEARCHES", 0)
        found = sample_balance(mask, layout, shards, length)
    assert found.devices == pytest.approx(wanted.devices, rel=0.01) and found.steps == pytest.approx(wanted.steps, rel=0.01)


def test_links():
    assert link_rate("TPU v5 lite") == 4.5e10 and link_rate("TPU v5p") == 9e10 and link_rate("cpu") is None
