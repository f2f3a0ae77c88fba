"""Which communication, which layout: what each costs a device and layer on a given mesh, in closed form, and why one is chosen.

c = T/W tokens a device, H and K query and key heads a device, D channels, b bytes an element, R rows, W devices that share one.
Of a device's tokens the keys with values and the four fields take KV = R c (2 K D b + 16) bytes, the gradients of keys and
values in float32 G = 8 R c K D; forward and backward, each compiled by itself:
    all-gather   moves 2 (W - 1) KV + (W - 1) G; holds 2 R T K D (b + 4)
    ring         moves W (2 KV + G) + G, hop by hop, behind the tiles of the hop before; holds 4 R c K D (b + 4). The last
                 hop brings own keys home; a ring around a ring of V moves W times as much as that one and its own W hops.
                 Where a mask lets no shard see what is farther, fewer hops, and jumps to and from the farthest
    all-to-all   moves (W - 1)/W of q, k', v', out, lse forward; q, k', v', lse, delta, d_out and the gradients backward, and
                 2 (W - 1) times the fields; K' key heads after repeats, out, lse and gradients of k', v' in float32; holds
                 what it receives
    ring x all-to-all: an all-to-all over the last axis of what a ring over the others works on
A ring waits for the longer of a step's tiles and its transfer. A visible pair costs 4 D FLOPs forward, 10 D backward; where
queries come in two halves (a distance plan that chooses dimensions) 6 D and 16 D, and an all-to-all moves both halves.
Rates are data-sheet peaks, so seconds compare strategies and do not predict a run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from lcx.attention.all_gather import AllGather
from lcx.attention.balance import Balance, balance, shard_pairs
from lcx.attention.communication import Communication
from lcx.attention.count import spans
from lcx.attention.mask import Mask
from lcx.attention.ring import Ring, meetings, travel
from lcx.attention.ulysses import RingUlysses, Ulysses
from lcx.batch import causal_info
from lcx.parallel.layout import Layout
from pallas_kernels.tile_attention.tokens import Tokens

# One-way bytes/s of one link between chips, by the start of `device_kind` (How to Scale Your Model, 2025, table of TPUs).
LINKS: Mapping[str, float] = {
    "TPU v4": 4.5e10,
    "TPU v5 lite": 4.5e10,
    "TPU v5e": 4.5e10,
    "TPU v5p": 9e10,
    "TPU v5": 9e10,
    "TPU v6": 9e10,
    "TPU7x": 9e10,
}
ROOM = 2 << 30  # bytes of keys and values of others that one layer may hold
FIELDS = 16  # bytes of the four fields of a token
SAMPLE = 128  # tokens a device that balance is counted on, for longer rows
SEARCHES = 1 << 23  # of queries among the keys of a device, in all


@dataclasses.dataclass(frozen=True)
class Work:
    """Attention of one layer on one device. heads, kv_heads: of the device. pairs: visible, of a row, over all its devices.
    halves: of a query, each as wide as a key.
    """

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    pairs: int
    itemsize: int = 2
    halves: int = 1


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one layer, forward and backward, on one device. moved: bytes sent. held: bytes at once beside its own share."""

    communication: Communication
    refused: str | None
    moved: int = 0
    held: int = 0
    seconds: float = math.inf

    @property
    def name(self) -> str:
        return type(self.communication).__name__


Seen = Callable[[int], Bool[np.ndarray, "W W"]]


def all_seen(shards: int) -> Bool[np.ndarray, "W W"]:
    """Every shard sees every other."""
    return np.ones((shards, shards), bool)


def estimates(
    work: Work, axes: dict[str, int], even: Balance, *, flops: float, link: float, seen: Seen = all_seen
) -> list[Estimate]:
    """One of each strategy, the fastest first, the refused last. axes: the mesh axes that share a row, outermost first. seen:
    of a row in so many shards, which may see which (`shards_seen`)."""
    found = []
    for communication in (AllGather(), Ring(), Ulysses(), RingUlysses()):
        reason = communication.refusal(axes, work.heads, work.kv_heads)
        if reason is None:
            moved, held, seconds = _cost(communication, work, tuple(axes.values()), even, flops, link, seen)
            found.append(Estimate(communication, None, moved, held, seconds))
        else:
            found.append(Estimate(communication, reason))
    return sorted(found, key=lambda estimate: estimate.seconds)


def explain(found: list[Estimate], room: int) -> str:
    """A table of the estimates, and which one is advised: the fastest that holds at most `room` bytes, and why."""
    lines = ["strategy      moved MiB   held MiB   ms a layer"]
    for one in found:
        cells = f"{one.moved / 2**20:9,.1f}  {one.held / 2**20:9,.1f}  {one.seconds * 1e3:11,.3f}"
        lines.append(f"{one.name:<12} {cells if one.refused is None else f'refused: {one.refused}'}")
    fits = [one for one in found if one.refused is None and one.held <= room]
    if not fits:
        return "\n".join([*lines, f"none holds at most {room / 2**20:,.0f} MiB: share rows among more devices"])
    best, faster = fits[0], [one.name for one in found if one.seconds < fits[0].seconds]
    why = f"the fastest of {len(fits)} that hold at most {room / 2**20:,.0f} MiB a layer"
    why += f" ({', '.join(faster)} would be faster, but holds more)" if faster else ""
    return "\n".join([*lines, f"advised: {best.name}, {why}"])


def sample_balance(mask: Mask, layout: Layout, shards: int, length: int) -> Balance:
    """Balance of a layout for one causal document of `length` tokens: of queries at even distances of each device, all of them
    where there are few, and all keys. Of a mask that reads more than indices, on a row of at most `SAMPLE` tokens a device."""
    if mask.intervals(np.zeros(1, np.int64)) is None:
        unit = layout.parts(shards)
        counted = min(length, max(unit, SAMPLE * shards // unit * unit))
        places = layout.permutation(counted, shards)
        index = causal_info(np.ones((1, counted), np.int32))
        info = dataclasses.replace(index, index=index.index[:, places], order=index.order[:, places])
        return balance(shard_pairs(mask, info, shards))
    own = np.asarray(layout.permutation(length, shards), np.int64).reshape(shards, -1)
    size = own.shape[1]
    count = min(size, max(SAMPLE // 4, SEARCHES // shards**2))
    queries = own[:, (2 * np.arange(count) + 1) * size // (2 * count)]
    found = spans(mask, queries.reshape(-1))
    seen = lambda keys: sum(np.searchsorted(keys, high) - np.searchsorted(keys, low) for low, high in found)
    return balance(np.stack([seen(np.sort(keys)).reshape(shards, count).sum(axis=1) for keys in own], axis=1))


def shards_seen(mask: Mask, layout: Layout, shards: int, length: int, groups: int) -> Bool[np.ndarray, "W W"]:
    """Of one causal document of `length` tokens in `groups` equal groups of its shards: which a ring takes to see which."""
    places = jnp.asarray(layout.permutation(length, shards), jnp.int32).reshape(groups, -1)
    tokens = Tokens(index=places, order=places, segments=jnp.ones_like(places), roles=jnp.zeros_like(places))
    return np.asarray(meetings(mask, tokens))


def link_rate(device_kind: str) -> float | None:
    """One-way bytes/s of one link; None for a device that is not in the table."""
    return next((rate for name, rate in LINKS.items() if device_kind.startswith(name)), None)


def _cost(communication, work: Work, sizes: tuple[int, ...], even: Balance, flops: float, link: float, seen: Seen):
    """(bytes moved, bytes held, seconds) of a layer, forward and backward."""
    W = math.prod(sizes)
    compute = (6 + 8 * work.halves) * work.head_dim * work.heads * work.rows * work.pairs / W / flops
    if isinstance(communication, Ulysses):
        moved, held = _exchange(work, W, W)
        return moved, held, compute + moved / link  # every device has whole rows: balanced
    if isinstance(communication, RingUlysses):
        inner, outer = sizes[-1], sizes[:-1]
        moved, held = _exchange(work, inner, W)
        repeats = inner // math.gcd(inner, work.kv_heads)
        each = dataclasses.replace(work, heads=work.heads // inner, kv_heads=work.kv_heads * repeats // inner)
        shard = _shard(each, math.prod(outer))
        hopped, kept = _travel(shard, outer, seen(math.prod(outer))), 2 * (shard.keys + shard.gradients)
        return moved + hopped, held + kept, moved / link + max(compute * even.steps, hopped / link)
    shard = _shard(work, W)
    if isinstance(communication, Ring):
        moved, held = _travel(shard, sizes, seen(W)), 2 * (shard.keys + shard.gradients)
        return moved, held, max(compute * even.steps, moved / link)
    moved = (W - 1) * (2 * (shard.keys + shard.fields) + shard.gradients)
    return moved, W * (shard.keys + shard.gradients), compute * even.devices + moved / link


class Shard(NamedTuple):
    """Bytes of one device's keys and values, of the fields of their tokens, and of their float32 gradients."""

    keys: int
    fields: int
    gradients: int


def _shard(work: Work, W: int) -> Shard:
    tokens = work.rows * work.length // W
    elements = 2 * tokens * work.kv_heads * work.head_dim
    return Shard(elements * work.itemsize, FIELDS * tokens, 4 * elements)


def _travel(shard: Shard, sizes: tuple[int, ...], seen: Bool[np.ndarray, "W W"]) -> int:
    """Bytes of a ring over the first axis around rings over the others, forward and backward (`RingFold`)."""
    if not sizes:
        return 0
    size = sizes[0]
    between = seen.reshape(size, len(seen) // size, size, -1)
    forward, backward = travel(between.any(axis=(1, 3)))
    visits = [*range(forward + 1), *range(size - backward, size)]
    jumps = lambda distance: min(distance % size, -distance % size).bit_count()
    keys, gradients = len(visits), len(visits) + jumps(forward)
    if backward:
        keys += jumps(backward)
        gradients += jumps(backward + 1) + jumps(1)
    own = 2 * keys * (shard.keys + shard.fields) + gradients * shard.gradients
    places = np.arange(size)
    met = (between[places, :, (places - visit) % size].any(axis=0) for visit in visits)
    return own + sum(_travel(shard, sizes[1:], inner) for inner in met)


def _exchange(work: Work, W: int, shards: int) -> tuple[int, int]:
    """Bytes moved and held among W of the `shards` devices of a row."""
    kv_heads = work.kv_heads * W // math.gcd(W, work.kv_heads)
    tokens, b, D, halves = work.rows * work.length // shards, work.itemsize, work.head_dim, work.halves
    given = tokens * (halves * work.heads + 2 * kv_heads) * D * b
    forward = given + tokens * work.heads * (4 * D + 4)
    backward = given + tokens * work.heads * ((1 + halves) * D * b + 8) + tokens * 2 * kv_heads * D * 4
    held = 2 * tokens * ((1 + halves) * work.heads + 2 * kv_heads) * D * b
    return (forward + backward) * (W - 1) // W + 2 * (W - 1) * FIELDS * tokens, held
