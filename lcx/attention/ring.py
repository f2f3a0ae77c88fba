"""Ring attention: keys travel from device to device while each attends to what it holds (Ring Attention, 2023).

After t hops device r holds the keys of device r - t. A step sends the next keys before it attends to the present ones, so the
transfer hides behind the tiles; in the backward pass the gradients of keys travel one step behind them and go home at the end.
Nothing of the ring is kept for the backward pass but q, k, v, out and lse, whatever its size.

Two things keep the transfers around the kernel in the TPU compiler's schedule (tests/attention/test_ring_schedule.py). It has
at most five permutes under way, those of a ring inside a ring included: so keys travel beside their values in one array, the
fields of the tokens in another, gradients in a third. And what arrives passes a barrier with a result of the kernel, else it
is sent behind the kernel, while its result is merged.

Which hops are worth making follows from the tokens: from statistics of every shard all devices compute which others can see
something of it, and the keys travel only as far forward, and as far backward, as somebody needs them. Packed short documents,
windows and any layout are cases of this. Backward means: they jump to the farthest place and hop forward from there, so one
loop, and one kernel in the program, does both ways. A ring over several axes is a ring around a ring, the last axis innermost.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lcx.attention.communication import Communication, Wrapped
from lcx.attention.merge import merge
from pallas_kernels.tile_attention.op import Fold
from pallas_kernels.tile_attention.tokens import Mask, Tokens, pad_tokens, tiles

PIECES = 8  # of a shard, whose statistics decide whether anybody sees it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(Communication):
    """Keys travel; a ring an axis of the sequence, the last one innermost (put it on the fast links)."""

    def wrap(self, fold, axes):
        return nested_rings(fold, axes)

    def refusal(self, axes, heads, kv_heads):
        return None

    @classmethod
    def examples(cls):
        return (cls(),)


def nested_rings(fold: Fold, axes: tuple[str, ...]) -> Fold:
    """A ring over the first axis around one over the second, and so on."""
    for axis in reversed(axes):
        fold = RingFold(fold, axis)
    return fold


class RingFold(Wrapped):
    def forward(self, q, k, v, q_tokens, k_tokens):
        def step(_, carry):
            held, part = carry
            arriving = self._send(held)
            here_k, here_v, here_tokens = _unpacked(held, k.shape[-1])
            out, lse = self.inner.forward(q, here_k, here_v, q_tokens, here_tokens)
            arriving, lse = jax.lax.optimization_barrier((arriving, lse))
            return arriving, merge(part, (out, lse))

        def journey(first, last, part):
            keys = _packed(k, v, k_tokens, first)
            return self._hop(first, last, step, (self._jump(keys, first, "out"), part))[1]

        return self._journeys(q_tokens, k_tokens, journey, _nothing(q, v))

    def backward(self, q, k, v, q_tokens, k_tokens, lse, delta, d_out):
        def step(_, carry):
            held, travelling, dq = carry
            sent = self._send((held, travelling))
            here_k, here_v, here_tokens = _unpacked(held, k.shape[-1])
            mine, *theirs = self.inner.backward(q, here_k, here_v, q_tokens, here_tokens, lse, delta, d_out)
            (arriving, travelling), theirs = jax.lax.optimization_barrier((sent, theirs))
            return arriving, travelling + jnp.concatenate(theirs, axis=-1), dq + mine

        def journey(first, last, sums):
            gradient, dq = sums
            keys = _packed(k, v, k_tokens, first)
            gradient = self._jump(gradient, jnp.maximum(first - 1, 0), "out")
            _, gradient, dq = self._hop(first, last, step, (self._jump(keys, first, "out"), gradient, dq))
            return self._jump(gradient, -last, "home"), dq

        zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
        sums = zeros(*k.shape[:-1], k.shape[-1] + v.shape[-1]), zeros(*q.shape)
        gradient, dq = self._journeys(q_tokens, k_tokens, journey, sums)
        return dq, *jnp.split(gradient, [k.shape[-1]], axis=-1)

    def _journeys(self, q_tokens: Tokens, k_tokens: Tokens, journey: Callable, carry):
        """`carry = journey(first place, last place, carry)`: from home on, and to home from as far as keys go backward."""
        forward, backward = hops(self.mask, q_tokens, k_tokens, self.axis, self.axes)
        size = jax.lax.axis_size(self.axis)

        def run(i, carry):
            first, last = jnp.where(i == 0, jnp.stack([0, forward]), jnp.stack([size - backward, size - 1]))
            return journey(first, last, carry)

        with jax.named_scope(f"ring over {self.axis} journeys"):
            return jax.lax.fori_loop(0, 1 + (backward > 0), run, carry)

    def _hop(self, first, last, step: Callable, carry):
        with jax.named_scope(f"ring over {self.axis} hops"):
            return jax.lax.fori_loop(first, last + 1, step, carry)

    def _send(self, tree, distance: int = 1):
        """Everything to the device `distance` places on."""
        size = jax.lax.axis_size(self.axis)
        pairs = [(i, (i + distance) % size) for i in range(size)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, pairs), tree)

    def _jump(self, tree, distance, name: str):
        """`_send` by a traced distance between -W and W, in powers of two, the shorter way round."""
        size = jax.lax.axis_size(self.axis)
        way = distance % size
        shorter = jnp.minimum(way, size - way)
        for sign, wanted in ((1, way <= size - way), (-1, way > size - way)):
            bit = 1
            while bit <= size // 2:
                send = lambda tree, by=sign * bit: self._send(tree, by)
                with jax.named_scope(f"ring over {self.axis} {name} by {sign * bit}"):
                    tree = jax.lax.cond(wanted & (shorter & bit > 0), send, lambda tree: tree, tree)
                bit *= 2
        return tree


def hops(
    mask: Mask, q_tokens: Tokens, k_tokens: Tokens, axis: str, axes: tuple[str, ...]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How far keys must travel around `axis`, forward and backward, for all to meet the queries that can see them.

    The same on all devices of the mesh. `axes`: the axis and those inside it, whose shards travel along.
    """
    queries, keys = _statistics(q_tokens), _statistics(k_tokens)
    for other in reversed(axes):
        queries, keys = (jax.lax.all_gather(side, other) for side in (queries, keys))
    size = jax.lax.axis_size(axis)
    flat = lambda side: jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -2, 0).reshape(leaf.shape[-2], size, -1), side)
    at = _offsets(_meet(mask, flat(queries), flat(keys)))
    everywhere = jax.sharding.get_abstract_mesh().axis_names
    return _journey(jax.lax.pmax(at.astype(jnp.int32), everywhere) > 0)


def meetings(mask: Mask, tokens: Tokens) -> Bool[Array, "W W"]:
    """Whether the queries of a shard may see keys of another, by the statistics that rings go by; tokens: [W, S] of shards."""
    pieces = jax.tree.map(lambda leaf: leaf[None], _statistics(tokens))
    return _meet(mask, pieces, pieces)


def travel(seen: Bool[np.ndarray, "W W"]) -> tuple[int, int]:
    """How far keys travel around a ring, forward and backward, where `seen` says which shards may see which."""
    forward, backward = _journey(_offsets(jnp.asarray(seen)))
    return int(forward), int(backward)


def _meet(mask: Mask, queries, keys) -> Bool[Array, "W W"]:
    """From statistics [B, W, pieces]."""
    spread = lambda side, at: jax.tree.map(lambda leaf: jnp.expand_dims(leaf, at), side)
    may, _ = mask.bounds(spread(queries, (2, 4)), spread(keys, (1, 3)))  # [B, W, W, pieces, pieces]
    return may.any(axis=(0, 3, 4))


def _offsets(needed: Bool[Array, "W W"]) -> Bool[Array, "W"]:
    """Whether somebody needs the keys from so many places before."""
    places = jnp.arange(len(needed))
    offset = (places[:, None] - places[None, :]) % len(needed)
    return jnp.zeros(len(needed), bool).at[offset.ravel()].max(needed.ravel())


def full_journeys(mesh_shape: Mapping[str, int]) -> Callable[[str], int]:
    """For `hlo.collectives`, how often the loops and branches of rings run where every key is seen from every device.

    Keys then visit each device on one journey, and their gradients are one place from home.
    """

    def trips(op_name: str) -> int:
        scopes = re.findall(r"ring over (\w+) (hops|journeys|out by|home by)( -?\d+)?", op_name)
        if not scopes:
            return 1
        axis, what, distance = scopes[-1]
        return {"hops": mesh_shape[axis], "journeys": 1, "out by": 0, "home by": int(distance == " 1")}[what]

    return trips


def _journey(needed: Bool[Array, "W"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(forward, backward): the fewest hops that visit every needed offset: those up to a cut forward, the rest backward."""
    size = needed.shape[0]
    place = jnp.arange(size)
    needed = needed & (place > 0)
    forward = jax.lax.cummax(jnp.where(needed, place, 0))
    reach = jax.lax.cummax(jnp.where(needed, size - place, 0), reverse=True)
    backward = jnp.append(reach[1:], 0)
    best = size - 1 - jnp.argmin((forward + backward)[::-1])
    return forward[best], backward[best]


def _statistics(tokens: Tokens):
    """Of up to PIECES consecutive pieces of the shard, every field [B, pieces]."""
    size = -(-tokens.index.shape[-1] // PIECES)
    return tiles(pad_tokens(tokens, size), size)


def _packed(k, v, k_tokens: Tokens, first):
    """What travels from the first place on: keys beside their values [B, S, K, D + E], and the fields of the tokens [4, B, S].

    The barrier keeps the compiler from holding it from one journey to the next, beside what travels.
    """
    (k, v, k_tokens), _ = jax.lax.optimization_barrier(((k, v, k_tokens), first))
    return jnp.concatenate([k, v], axis=-1), jnp.stack(k_tokens)


def _unpacked(held, width: int):
    return *jnp.split(held[0], [width], axis=-1), Tokens(*held[1])


def _nothing(q, v):
    """The part of no keys: the identity of `merge`."""
    return jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
