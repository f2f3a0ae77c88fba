"""The mask algebra: who sees whom, never as an array outside the reference.

Every mask stands on the base rule: no padding; same segment, or the key is shared (-1), or the query is a reader (-2);
and `order[key] <= order[query]`. The terms below restrict it further and are closed under `&` and `|`. Distances and
places are in units of `index`, the place inside the token's own segment.

A term answers three questions: which pairs are visible; can or must a tile of pairs be visible (sound, so a kernel may
skip and may leave the mask out); and which key indices a query index sees, as intervals, so that FLOPs are counted exactly.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool

from lcx.batch import AnyArray, TokenInfo
from lcx.spec import Spec
from pallas_kernels.tile_attention.tokens import Tiles, Tokens

FAR = 1 << 40
Intervals = list[tuple[np.ndarray, np.ndarray]]  # half-open ranges [low, high) of key indices, one pair of arrays a term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask(Spec, abc.ABC):
    """Base of every term. `visible` and `bounds` are the base rule and this term; subclasses give the term alone."""

    def visible(self, q: Tokens, k: Tokens) -> Bool[AnyArray, "..."]:
        """Visible pairs of broadcastable query fields [..., q, 1] and key fields [..., 1, k]."""
        same = (q.segments == k.segments) | (k.segments == -1) | (q.segments == -2)
        real = (q.segments != 0) & (k.segments != 0)
        return same & real & (k.order <= q.order) & self.term(q, k)

    def bounds(self, q: Tiles, k: Tiles) -> tuple[Bool[AnyArray, "..."], Bool[AnyArray, "..."]]:
        """(may, must) of broadcastable query tiles [..., q, 1] and key tiles [..., 1, k]."""
        may_segment, must_segment = _segment_bounds(q, k)
        may, must = self.term_bounds(q, k)
        may = may & may_segment & (k.order_low <= q.order_high)
        must = must & must_segment & (k.order_high <= q.order_low)
        return may, must

    @abc.abstractmethod
    def term(self, q: Tokens, k: Tokens) -> Bool[AnyArray, "..."]:
        """Pairs that the term lets through."""

    @abc.abstractmethod
    def term_bounds(self, q: Tiles, k: Tiles) -> tuple[Bool[AnyArray, "..."], Bool[AnyArray, "..."]]:
        """(may, must) of the term alone."""

    @abc.abstractmethod
    def intervals(self, index: np.ndarray) -> Intervals | None:
        """Key indices seen by each query index under the term alone; None if it depends on more than indices."""

    @property
    def reach(self) -> int | None:
        """No key is visible whose `query - key` is as large or larger; None: there is no such bound."""
        return None

    def __and__(self, other: "Mask") -> "Mask":
        return And(terms=(self, other))

    def __or__(self, other: "Mask") -> "Mask":
        return Or(terms=(self, other))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal(Mask):
    """Everything that the base rule lets through."""

    def term(self, q, k):
        return (q.index == q.index) & (k.index == k.index)

    def term_bounds(self, q, k):
        everything = (q.index_low == q.index_low) & (k.index_low == k.index_low)
        return everything, everything

    def intervals(self, index):
        return [(np.full_like(index, -FAR), np.full_like(index, FAR))]

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sized(Mask):
    size: int

    def validate(self):
        self.check(self.size >= 1, "size", "at least 1 token")

    @classmethod
    def examples(cls):
        return (cls(size=1), cls(size=5), cls(size=64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(_Sized):
    """`|query - key| < size`: the `size` nearest keys on each side, itself included."""

    @property
    def reach(self):
        return self.size

    def term(self, q, k):
        return abs(q.index - k.index) < self.size

    def term_bounds(self, q, k):
        nearest, farthest = _distances(q, k)
        return (nearest < self.size) & (farthest > -self.size), (nearest > -self.size) & (farthest < self.size)

    def intervals(self, index):
        return [(index - self.size + 1, index + self.size)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sink(_Sized):
    """`key < size`: the first tokens of a segment (attention sinks)."""

    def term(self, q, k):
        return (k.index < self.size) & (q.index == q.index)

    def term_bounds(self, q, k):
        known = q.index_low == q.index_low
        return known & (k.index_low < self.size), known & (k.index_high < self.size)

    def intervals(self, index):
        return [(np.full_like(index, -FAR), np.full_like(index, self.size))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk(_Sized):
    """`query // size == key // size`: chunked attention."""

    @property
    def reach(self):
        return self.size

    def term(self, q, k):
        return q.index // self.size == k.index // self.size

    def term_bounds(self, q, k):
        q_low, q_high, k_low, k_high = (x // self.size for x in (q.index_low, q.index_high, k.index_low, k.index_high))
        return (q_low <= k_high) & (k_low <= q_high), (q_low == q_high) & (k_low == k_high) & (q_low == k_low)

    def intervals(self, index):
        low = index // self.size * self.size
        return [(low, low + self.size)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Within(_Sized):
    """`query - key < size`: the near region of a distance plan. Exactly the pairs that `Beyond` leaves out."""

    @property
    def reach(self):
        return self.size

    def term(self, q, k):
        return q.index - k.index < self.size

    def term_bounds(self, q, k):
        nearest, farthest = _distances(q, k)
        return nearest < self.size, farthest < self.size

    def intervals(self, index):
        return [(index - self.size + 1, np.full_like(index, FAR))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beyond(_Sized):
    """`query - key >= size`: the far region of a distance plan. Exactly the pairs that `Within` leaves out."""

    def term(self, q, k):
        return q.index - k.index >= self.size

    def term_bounds(self, q, k):
        nearest, farthest = _distances(q, k)
        return farthest >= self.size, nearest >= self.size

    def intervals(self, index):
        return [(np.full_like(index, -FAR), index - self.size + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ahead(_Sized):
    """`key - query >= size`: keys that come after, far from the query, where order shows them."""

    def term(self, q, k):
        return k.index - q.index >= self.size

    def term_bounds(self, q, k):
        nearest, farthest = _distances(q, k)
        return nearest <= -self.size, farthest <= -self.size

    def intervals(self, index):
        return [(index + self.size, np.full_like(index, FAR))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunksBack(_Sized):
    """`query // size - key // size` is 1, or with `farther` 2 and more: keys of the chunk before, or of those before it."""

    farther: bool = False

    @property
    def reach(self):
        return None if self.farther else 2 * self.size

    def term(self, q, k):
        back = q.index // self.size - k.index // self.size
        return back >= 2 if self.farther else back == 1

    def term_bounds(self, q, k):
        q_low, q_high, k_low, k_high = (x // self.size for x in (q.index_low, q.index_high, k.index_low, k.index_high))
        least, most = q_low - k_high, q_high - k_low
        return (most >= 2, least >= 2) if self.farther else ((least <= 1) & (most >= 1), (least == 1) & (most == 1))

    def intervals(self, index):
        own = index // self.size * self.size
        return [(np.full_like(index, -FAR), own - self.size)] if self.farther else [(own - self.size, own)]

    @classmethod
    def examples(cls):
        return (cls(size=3), cls(size=5, farther=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hide(Mask):
    """Queries of role `query_role` do not see keys of role `key_role`."""

    query_role: int
    key_role: int

    def validate(self):
        for field in ("query_role", "key_role"):
            self.check(0 <= getattr(self, field) <= 127, field, "a role from 0 to 127")

    def term(self, q, k):
        return (q.roles != self.query_role) | (k.roles != self.key_role)

    def term_bounds(self, q, k):
        def inside(tile, role):
            return (tile.role_low <= role) & (role <= tile.role_high)

        def throughout(tile, role):
            return (tile.role_low == role) & (tile.role_high == role)

        may = ~(throughout(q, self.query_role) & throughout(k, self.key_role))
        return may, ~(inside(q, self.query_role) & inside(k, self.key_role))

    def intervals(self, index):
        return None

    @classmethod
    def examples(cls):
        return (cls(query_role=0, key_role=1), cls(query_role=1, key_role=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Combined(Mask):
    terms: tuple[Mask, ...]

    def validate(self):
        self.check(len(self.terms) >= 1, "terms", "at least one mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class And(_Combined):
    """Pairs that every term lets through."""

    @property
    def reach(self):
        return min((term.reach for term in self.terms if term.reach is not None), default=None)

    def term(self, q, k):
        return functools.reduce(lambda a, b: a & b, (term.term(q, k) for term in self.terms))

    def term_bounds(self, q, k):
        return _fold(lambda a, b: a & b, (term.term_bounds(q, k) for term in self.terms))

    def intervals(self, index):
        result: Intervals = [(np.full_like(index, -FAR), np.full_like(index, FAR))]
        for term in self.terms:
            given = term.intervals(index)
            if given is None:
                return None
            result = [(np.maximum(a, low), np.minimum(b, high)) for a, b in result for low, high in given]
        return result

    @classmethod
    def examples(cls):
        return (Window(size=7) & Chunk(size=8), Beyond(size=3) & Within(size=9))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Or(_Combined):
    """Pairs that some term lets through."""

    @property
    def reach(self):
        each = [term.reach for term in self.terms]
        return None if None in each else max(each)

    def term(self, q, k):
        return functools.reduce(lambda a, b: a | b, (term.term(q, k) for term in self.terms))

    def term_bounds(self, q, k):
        return _fold(lambda a, b: a | b, (term.term_bounds(q, k) for term in self.terms))

    def intervals(self, index):
        given = [term.intervals(index) for term in self.terms]
        return None if any(part is None for part in given) else [pair for part in given for pair in part]

    @classmethod
    def examples(cls):
        return (Sink(size=2) | Window(size=4), Sink(size=1) | (Chunk(size=16) & Window(size=6)))


def tokens_of(info: TokenInfo) -> Tokens:
    """The fields that masks read, roles filled with 0 where the batch has none."""
    roles = info.index * 0 if info.roles is None else info.roles
    return Tokens(info.index, info.order, info.segments, roles)


def _fold(join, pairs: Iterable) -> tuple:
    mays, musts = zip(*pairs, strict=True)
    return functools.reduce(join, mays), functools.reduce(join, musts)


def _distances(q: Tiles, k: Tiles):
    """Smallest and largest query - key of a tile."""
    return q.index_low - k.index_high, q.index_high - k.index_low


def _segment_bounds(q: Tiles, k: Tiles):
    q_real, k_real = q.ordinary | q.shared | q.reader, k.ordinary | k.shared | k.reader
    overlap = q.ordinary & k.ordinary & (q.segment_low <= k.segment_high) & (k.segment_low <= q.segment_high)
    may = overlap | (q_real & k.shared) | (q.reader & k_real)
    only_shared = ~(k.ordinary | k.reader)
    only_reader = ~(q.ordinary | q.shared)
    one = (q.segment_low == q.segment_high) & (k.segment_low == k.segment_high) & (q.segment_low == k.segment_low)
    one &= ~(q.shared | q.reader | k.reader)
    must = ~(q.padding | k.padding) & (only_shared | only_reader | one)
    return may, must
