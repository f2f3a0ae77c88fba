"""Distance plans: rotations that depend on the pair, not only on its tokens. Ordered regions of pairs that share one softmax.

In each region a pair is turned by positions that are functions of the two indices, each of its own token. The regions of a
plan are apart and cover every pair that a causal mask can show, or every pair where the plan is `both_ways`. A plan without
regions chooses what a query sees (`lcx/positions/long_heads.py`).
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from lcx.attention.mask import Mask
from lcx.positions.frequencies import Frequencies, FrequencyRule
from lcx.spec import Spec

Places = Callable[[Int[Array, "B T"]], Float[Array, "B T P"]]


class Region(NamedTuple):
    """mask: its pairs. query, key: positions by index. axes: which of the P positions drives each pair of channels, None if
    there is one. Pairs of channels that a plan does not choose keep their index."""

    mask: Mask
    query: Places
    key: Places
    axes: Int[np.ndarray, "C"] | None = None


class PlanReach(NamedTuple):
    """Tokens of the longest document in which no key stands farther back than in a trained one: every: for all rotated pairs of
    channels; some: for the pair that goes farthest. None is any."""

    every: int | None
    some: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistancePlan(Spec, abc.ABC):
    """Base of every plan. Positions of the tokens must be their indices, on one axis."""

    @abc.abstractmethod
    def reach(self, trained: int) -> PlanReach:
        """How far the plan reads before some key stands `trained` positions back, which documents of so many tokens have not
        shown."""

    @property
    def chooses(self) -> bool:
        """Whether heads differ in the pairs of channels that regions turn; queries then come in two halves, from `chosen`."""
        return False

    def check_model(self, layers: int, heads: int, pairs: int) -> None:
        """Raises SpecError if the plan does not fit so many layers, query heads and rotated pairs of channels."""

    def chosen(self, q: Float[Array, "B T H D"], layer: Int[Array, ""] | None) -> Float[Array, "B T H 2D"]:
        """Queries of the chosen pairs, the others 0, and of the others; keys are turned both ways for them."""
        raise NotImplementedError(f"{type(self).__name__} chooses nothing")

    @property
    def both_ways(self) -> bool:
        """Whether keys that come after a query are in some region too."""
        return False

    @property
    def reads_queries(self) -> bool:
        """Whether keys carry the queries of their tokens (`held`) and all keys of a row must meet its queries at once."""
        return False

    def held(self, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"]) -> Float[Array, "B T K X"]:
        """What keys are where they carry queries."""
        raise NotImplementedError(f"{type(self).__name__} reads no queries of keys")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionPlan(DistancePlan):
    """Base of the plans that are regions of pairs."""

    @abc.abstractmethod
    def regions(self, pairs: int) -> tuple[Region, ...]:
        """For heads with so many rotated pairs of channels."""


@dataclasses.dataclass(frozen=True)
class Distances:
    """A plan with the rope that it turns by, for rows of at most `length` tokens. Hashable and static.

    summed: keys that carry queries carry the summaries of their chunks too (`chunk_summaries.sum_up`).
    """

    plan: DistancePlan
    rope: FrequencyRule
    head_dim: int
    length: int
    summed: bool = False

    @property
    def frequencies(self) -> Frequencies:
        return self.rope.frequencies(self.head_dim, self.length)

    @property
    def regions(self) -> tuple[Region, ...]:
        return self.plan.regions(self.frequencies.inv_freq.shape[-1])


def plain(index):
    """The index itself."""
    return index[..., None].astype(np.float32)
