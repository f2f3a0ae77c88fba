"""The contract of a policy: which tokens of a cache go for good, or become fewer, and when."""

import abc
import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.cache.policies.budgets import Even, LayerBudgets
from lcx.cache.scorers.scorer import Reads, Scored
from lcx.record import record
from lcx.spec import Spec


@record
class Kept:
    """What stays, in C places, which are the `slots` that were asked for. index: places among the tokens scored, ascending, of
    G key heads, or of all where G is 1; there: which of these hold one, those in front. k, v: what stands in their place, keys
    as the cache holds them (`Scored.raw`), or None for the tokens themselves, whose codes stay. counts: how many tokens each
    stands for, or None for as many as before."""

    index: Int[Array, "B G C"]
    there: Bool[Array, "B G C"]
    k: Float[Array, "B K C D"] | None = None
    v: Float[Array, "B K C E"] | None = None
    counts: Float[Array, "B K C"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(Reads, Spec, abc.ABC):
    """Base of every policy.

    keep: tokens that a row keeps in its slots, a number, or a share of those it has read. Those that a codec holds in full
    precision come on top, and are not among those that it chooses from or judges by. scope: whether it acts in passes of
    several tokens (`prefill`), of one (`decode`) or both. every: slots beyond `keep`: in decoding tokens are dropped when they
    are full; after `prefill` alone they are the room of the answer. layers: how the budget is spread over them.
    """

    keep: int | float
    scope: Literal["prefill", "decode", "both"] = "both"
    every: int = 64
    layers: LayerBudgets = Even()

    def validate(self):
        whole = isinstance(self.keep, int)
        self.check(
            self.keep >= 1 if whole else 0 < self.keep <= 1, "keep", "a number of tokens, or a share above 0, at most 1.0"
        )
        self.check(self.every >= 1, "every", "at least 1 token")

    @property
    def by_layer(self):
        return self.layers != Even()

    @property
    def rotated(self) -> bool:
        """Whether it writes to keys that are rotated for good."""
        return False

    @property
    def rereads(self) -> bool:
        """Whether it chooses once, when a prompt has been read a second time (`lcx.inference.rereading`); until then slots hold
        all tokens."""
        return self.marks == "repeated"

    def share(self, layer: int, depth: int) -> float:
        """A layer's, of the mean budget."""
        return self.layers.share(layer, depth)

    def slots(self, length: int, share: float) -> int:
        """Slots for rows of `length` tokens. share: the layer's, of the mean budget."""
        most = self.most(length, share)
        return max(length, most) if self.scope == "decode" else most + self.every

    def most(self, length: int, share: float) -> int:
        """The largest budget of rows of `length` tokens."""
        budget = int(self.keep * share) if isinstance(self.keep, int) else math.ceil(self.keep * length * share)
        return min(max(1, budget), length)

    def budget(self, seen: Int[Array, "B"], share: float) -> Int[Array, "B"]:
        """Tokens that rows keep which have read so many."""
        if isinstance(self.keep, int):
            return jnp.full_like(seen, max(1, int(self.keep * share)))
        return jnp.maximum(1, jnp.floor(seen * (self.keep * share) + 1e-4).astype(jnp.int32))

    def full(self, used: Int[Array, "B G"], seen: Int[Array, "B"], share: float, known: Any) -> Bool[Array, "B"]:
        """Whether it acts on a row in decoding. used: slots with the tokens that are about to move in. known: of `tables`."""
        return used.max(axis=1) > self.budget(seen, share) + self.every

    @property
    @abc.abstractmethod
    def by_head(self) -> bool:
        """Whether key heads keep tokens of their own."""

    def leader(self, layer: int) -> int | None:
        """The layer whose choice is that of `layer` too; None if it chooses for itself."""
        return None

    @property
    def merges(self) -> bool:
        """Whether what it keeps stands for several tokens."""
        return False

    @property
    def weighs(self) -> bool:
        """Whether attention counts what stands for several tokens so many times."""
        return False

    @abc.abstractmethod
    def compress(self, now: Scored, slots: int) -> Kept:
        """What stays of the tokens, at most `now.budget` of a row in the mean over its key heads. slots: places to fill, those
        of `slots` rounded up to whole blocks, as many on every device."""
