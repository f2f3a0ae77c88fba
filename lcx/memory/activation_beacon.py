"""Activation Beacon (Zhang et al. 2024): of each window of a document only the keys and values of a few beacon tokens stay.

A document is read in windows of W tokens. Among or behind the tokens of a window stand beacons, one for `ratio` a of them, with
an embedding and projections of their own; each layer keeps their keys, before rotation, and values, and drops those of the
window's tokens. Keys of a window are then [sink | beacons of the windows before | window], at positions 0, 1, 2 ... of this
list: a beacon's place in its window is not the one that it has in memory. The rest of the model is left as it is.

    interleaved  (second version) a beacon behind every a tokens; all is causal, so that tokens see the beacons before them
    appended     (first version) W / a beacons behind a whole window, which none of its tokens sees. Beacon i sees all before
                 the window and of the window
                   full     all tokens and the beacons before it
                   step     tokens before (i + 1) a; with `previous` the beacons before it
                   segment  tokens from i a to (i + 1) a; with `previous` the beacons before it

Nothing of this is recurrent over windows: a layer's beacons need the layer below alone. Whole rows are read at once, as two
sums of one softmax, of keys in the query's own window and of beacons of earlier ones.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from lcx.batch import PADDING, TokenInfo, sum_before
from lcx.memory.model_memory import ModelMemory, added
from lcx.record import record, static

ORDINARY, BEACON = 0, 1  # roles

Projection = Literal["query", "key", "value", "output"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationBeacon(ModelMemory):
    """window: tokens. ratio: of them that one beacon stands for. ratios: others that training may draw, 0 for windows whose own
    keys stay. sink: first tokens of a document whose keys stay. most: beacons that a window reads, the newest; None is all;
    the others are gone, and places counted without them (up to a shift of all, which no rope tells).
    own: projections that beacons have of their own. like: the token whose embedding a beacon's begins as; None draws it."""

    window: int
    ratio: int
    ratios: tuple[int, ...] = ()
    layout: Literal["interleaved", "appended"] = "interleaved"
    coverage: Literal["full", "step", "segment"] = "full"
    previous: bool = True
    sink: int = 0
    most: int | None = None
    own: tuple[Projection, ...] = ("query", "key", "value")
    like: int | None = None

    def validate(self):
        self.check(self.window >= 1, "window", "at least 1 token")
        divides = lambda ratio: ratio >= 1 and self.window % ratio == 0
        self.check(divides(self.ratio), "ratio", f"a divisor of window = {self.window}")
        self.check(all(r == 0 or divides(r) for r in self.ratios), "ratios", f"0 or divisors of window = {self.window}")
        full = self.coverage == "full"
        self.check(full or self.layout == "appended", "coverage", "'full' beside layout = 'interleaved'")
        self.check(self.previous or not full, "previous", "True beside coverage = 'full'")
        self.check(0 <= self.sink <= self.window, "sink", f"0 to window = {self.window}")
        self.check(self.most is None or self.most >= 1, "most", "at least 1, or None")
        self.check(len(set(self.own)) == len(self.own) >= 1, "own", "distinct projections, at least one")
        self.check(self.like is None or self.like >= 0, "like", "a token, or None")

    def positions(self, length: int, ratio: int) -> int:
        """How many positions a document of so many tokens reads at a ratio, the last window and its beacons counted whole."""
        windows, each = max(0, -(-length // self.window) - 1), self.window // ratio
        seen = windows * each if self.most is None else min(windows * each, self.most)
        return (self.sink if windows else 0) + seen + self.window + each

    def fitting(self, length: int, positions: int) -> "ActivationBeacon":
        """With the smallest of its ratios at which `length` tokens are read within so many positions.

        Raises SpecError where none is large enough.
        """
        for ratio in sorted({self.ratio, *self.ratios} - {0}):
            if self.positions(length, ratio) <= positions:
                return dataclasses.replace(self, ratio=ratio)
        self.fail("ratios", self.ratios, f"one large enough for {length} tokens at {positions} positions")

    @property
    def smallest(self) -> int:
        """The smallest ratio that training may draw."""
        return min({self.ratio, *self.ratios} - {0})

    @property
    def first_has_loss(self) -> bool:
        """Whether a document's first window is affected by beacons."""
        return self.layout == "interleaved"

    def beacons(self, tokens: int, *, whole: bool, ratio: int) -> int:
        """The most beacons of so many tokens in a row; whole: whether all of their documents begin with them."""
        if self.layout == "interleaved":
            return tokens // ratio if whole else -(-tokens // ratio)
        return (tokens // self.window if whole else -(-tokens // self.window)) * (self.window // ratio)

    def build(self, width: int, *, rngs: nnx.Rngs) -> "BeaconModule":
        """Its parameters beside those of attention."""
        return BeaconModule(self, width, rngs)

    @classmethod
    def examples(cls):
        return (
            cls(window=4, ratio=2),
            cls(
                window=4, ratio=2, layout="appended", coverage="step", previous=False, sink=1, own=("query", "value", "output")
            ),
            cls(window=4, ratio=2, layout="appended", coverage="segment", most=3),
        )


class BeaconModule(nnx.Module):
    """embedding: of a beacon; with `like`, what is added to that token's."""

    def __init__(self, spec: ActivationBeacon, width: int, rngs: nnx.Rngs):
        drawn = jax.random.normal(rngs.params(), (1, width)) / jnp.sqrt(width)
        self.embedding = added(drawn if spec.like is None else jnp.zeros_like(drawn), (None, "width"))


@record
class BeaconInfo(TokenInfo):
    """Of `raw` tokens of a text and the beacons behind them in the array, wherever they stand in the text.

    index: 2 W times the window, and the place in it; so is `order`, but that a beacon which sees a part of its window stands
    behind the last token of that part. positions: within [memory | window]. number: place in the memory of those that stay, -1
    of others. seen: what memory holds before the window.
    """

    number: Int[Array, "B T"]
    seen: Int[Array, "B T"]
    raw: int = static()

    def reading(self) -> TokenInfo:
        """As queries of the memory."""
        return TokenInfo(index=self.seen, order=self.seen, positions=self.positions, segments=self.segments)

    def without(self, dropped: Int[Array, "B T"]) -> "BeaconInfo":
        """At positions so much smaller."""
        return dataclasses.replace(self, positions=self.positions - dropped[..., None])

    def held(self, first: int = 0, behind: int | None = None) -> TokenInfo:
        """As keys in memory, of places from `first` on to one less than `behind`."""
        there = (self.number >= first) & (self.number >= 0) & (True if behind is None else self.number < behind)
        segments, behind = jnp.where(there, self.segments, PADDING), self.number + 1
        return TokenInfo(index=behind, order=behind, positions=self.number[..., None].astype(jnp.float32), segments=segments)

    def beacons(self) -> "BeaconInfo":
        """Without those that are none."""
        return dataclasses.replace(self, segments=jnp.where(self.roles == BEACON, self.segments, PADDING))

    def part(self, columns: slice, raw: int) -> "BeaconInfo":
        return dataclasses.replace(self.take(columns), raw=raw)


def lay_out(spec: ActivationBeacon, info: TokenInfo, beacons: int, ratios: Int[Array, "B T"] | None = None) -> BeaconInfo:
    """Tokens of a text with room for so many beacons behind them. ratios: of each token's window; None is the spec's."""
    W = spec.window
    real, window, place = info.segments != PADDING, info.index // W, info.index % W
    ratio = jnp.full_like(info.index, spec.ratio) if ratios is None else ratios
    divisor = jnp.maximum(ratio, 1)
    stays = jnp.where(ratio > 0, W // divisor + jnp.where(window == 0, spec.sink, 0), W)  # of a window
    if ratios is None:
        seen = jnp.where(window > 0, spec.sink, 0) + window * (W // spec.ratio)
    else:
        seen = sum_before(jnp.where(real & (place == W - 1), stays, 0), info.segments)
    sink = (window == 0) & (place < spec.sink)
    number = jnp.where(ratio == 0, seen + place, jnp.where(sink, place, -1))
    within = place + jnp.where(ratio > 0, place // divisor, 0) if spec.layout == "interleaved" else place
    row = {"segments": info.segments, "seen": seen, "number": number, "within": within, "order": within, "turn": within}
    row |= {"window": window}

    if spec.layout == "interleaved":
        new = real & (ratio > 0) & ((place + 1) % divisor == 0)
        new = new.astype(jnp.int32)
    else:
        new = jnp.where(real & (ratio > 0) & (place == W - 1), W // divisor, 0)
    ends = jnp.cumsum(new, axis=1)
    slot = jnp.broadcast_to(jnp.arange(beacons, dtype=jnp.int32), (len(new), beacons))
    source = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(beacons), side="right"))(ends)
    there, source = source < new.shape[1], jnp.minimum(source, new.shape[1] - 1)
    at = lambda field: jnp.take_along_axis(field, source, axis=1)
    a, base = at(divisor), at(seen) + jnp.where(at(window) == 0, spec.sink, 0)
    if spec.layout == "interleaved":
        i = at(place) // a
        within = order = turn = (i + 1) * (a + 1) - 1
    else:
        i = slot - (at(ends) - at(new))
        within, shift = W + i, i if spec.previous else 0
        order = within if spec.coverage == "full" else (i + 1) * a - 1
        turn = {"full": W + i, "step": (i + 1) * a + shift, "segment": a + shift}[spec.coverage]
    them = {"segments": jnp.where(there, at(info.segments), PADDING), "seen": at(seen), "number": base + i}
    them |= {"within": within, "order": order, "turn": turn, "window": at(window)}

    both = {name: jnp.concatenate([row[name], jnp.where(there, them[name], 0)], axis=1) for name in row}
    roles = jnp.concatenate([jnp.full_like(info.index, ORDINARY), jnp.full_like(source, BEACON)], axis=1)
    first = 2 * W * both["window"]
    return BeaconInfo(
        index=first + both["within"],
        order=first + both["order"],
        positions=(both["seen"] + both["turn"])[..., None].astype(jnp.float32),
        segments=both["segments"],
        roles=roles,
        number=jnp.where(both["segments"] == PADDING, -1, both["number"]),
        seen=both["seen"],
        raw=info.shape[1],
    )
