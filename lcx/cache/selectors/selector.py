"""The contract of a selector: which slots the queries of a pass read. Nothing goes for good, as it does by a policy."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int

from lcx.attention.merge import Part
from lcx.batch import TokenInfo
from lcx.cache.kv_state import Held
from lcx.cache.scorers.scorer import Rule
from lcx.spec import Spec

Find = Callable[..., Part]  # what queries find in coded slots [B, K, n, ...] with infos [B, K or 1, n], from a row on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector(Spec, abc.ABC):
    """Base of every selector. page: slots side by side that are fetched together. dense_layers: the first layers, which read
    all."""

    page: int
    dense_layers: int

    def validate(self):
        self.check(self.page >= 1, "page", "at least 1 slot")
        self.check(self.dense_layers >= 0, "dense_layers", "0 or more layers")

    @property
    def queries(self) -> int:
        """The newest queries that the state holds for it."""
        return 0

    @property
    def several(self) -> bool:
        """Whether passes of several tokens choose too; else they read all."""
        return False

    @property
    def prepared(self) -> bool:
        """Whether a state has to be prepared (`lcx.inference.squeeze`) before it chooses; until then all is read."""
        return False

    @abc.abstractmethod
    def told(
        self, cache: Any, held: Held, tables: Any, frequencies: Any, place: Any = None, layer: Int[Array, ""] | None = None
    ) -> Held:
        """Slots with what the selector is told of pages at `place` [B, K, n], just written, of all if None, in `held.pages`:
        arrays [B, K, ...]. layer: of slots of all layers, the one meant."""

    @abc.abstractmethod
    def found(
        self,
        find: Find,
        q: Float[Array, "B T H D"],
        q_info: TokenInfo,
        rule: Rule,
        told: Any,
        coded: Any,
        info: TokenInfo,
        axes: tuple[str, ...] = (),
        first: Int[Array, ""] | int = 0,
    ) -> Part:
        """What queries find in the slots that they are to read, of each key head its own.

        rule: of the layer's attention. axes: of the mesh, over which slots are shared out. first: the row of `coded` and `info`
        that is row 0 of the queries.
        """
