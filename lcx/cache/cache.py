"""The contract of a cache: what a mixer keeps of the keys and values of earlier tokens.

Chunks of any sizes, appended one after the other, give what one pass over the whole row gives, but for what a cache rounds or
leaves out on purpose. Padding consumes no slot and is never seen. Tokens that find no slot are counted in the state's `overflow
[B]`, never dropped unseen: whoever generates looks at it, and says what the state names as its `remedy`
(`lcx.inference.overflow`).
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import Mask
from lcx.batch import TokenInfo
from lcx.cache.scorers.scorer import Asked, Rule
from lcx.parallel.rules import Rules
from lcx.positions.distance_plan import Distances
from lcx.positions.frequencies import Frequencies
from lcx.positions.linear_bias import LinearBias
from lcx.positions.rotate import rotate
from lcx.spec import Spec


@dataclasses.dataclass(frozen=True)
class At:
    """Where in a model a cache is. heads: of its queries. shards: over which its slots are shared out. reach: of its mask."""

    layer: int = 0
    depth: int = 1
    heads: int = 1
    shards: int = 1
    reach: int | None = None


class Pooled(abc.ABC):
    """A state whose rows draw on one memory, so that whoever seats rows asks it, where others are cut along their rows."""

    overflow: Int[Array, "B"]

    @abc.abstractmethod
    def seated(self, alone: "Pooled", row: Int[Array, ""]) -> "Pooled":
        """With the first row of another state in the place of one."""

    @abc.abstractmethod
    def released(self, rows: Bool[Array, "B"]) -> "Pooled":
        """With what some rows hold given back; they are empty then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache(Spec, abc.ABC):
    """Base of every cache: pure functions of a state, which is a pytree."""

    @abc.abstractmethod
    def init(
        self,
        batch_size: int,
        length: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype,
        axes: int = 1,
        at: At = At(),
    ) -> Any:
        """The empty state for `length` tokens a row that have `axes` position axes."""

    @abc.abstractmethod
    def length(self, state: Any) -> int:
        """The `length` that the state was made for."""

    @abc.abstractmethod
    def append(
        self,
        state: Any,
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K E"],
        info: TokenInfo,
        frequencies: Frequencies | None,
    ) -> Any:
        """The state with the non-padding tokens of a chunk after those already there; `k` comes raw, before rotation."""

    @property
    def exact(self) -> bool:
        """Whether queries find in it what they find in all keys as they are."""
        return False

    @property
    def room(self) -> int | None:
        """The most tokens of an answer that it has slots for; None if it holds whatever length it was made for."""
        return None

    @property
    def by_token(self) -> bool:
        """Whether a pass of one token finds something else than one of several."""
        return False

    @property
    def by_layer(self) -> bool:
        """Whether layers have states of their own kind."""
        return False

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether a state of as many rows holds rows of so many tokens beside each other."""
        return True

    def placed(self, state: Any, rules: Rules) -> Any:
        """The empty state with its rows, key heads and slots on the ambient mesh, as far as the cache shares them out."""
        return state

    def rewrite(self, state: Any, before: Any, keys: Callable) -> Any:
        """The state with keys(k, v, info, new) for its keys; new [B, S]: slots that were empty `before`."""
        raise NotImplementedError(
            f"{type(self).__name__} does not rewrite keys, which a distance plan that reads queries needs"
        )

    @abc.abstractmethod
    def attend(
        self,
        state: Any,
        q: Float[Array, "B T H _"],
        q_info: TokenInfo,
        *,
        mask: Mask,
        scale: float,
        frequencies: Frequencies | None,
        softcap: float | None = None,
        bias: LinearBias | None = None,
        distances: Distances | None = None,
        backend: str = "auto",
        rules: Rules = Rules(),
    ) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
        """(out, lse) of rotated queries, whose own keys are already appended; with `distances` queries and keys are raw.

        rules: how rows, heads and slots lie on the ambient mesh; a row's queries are on one device."""

    def prune(
        self,
        state: Any,
        asked: Asked,
        *,
        frequencies: Frequencies | None,
        rule: Rule,
        leader: Any = None,
        rules: Rules = Rules(),
    ) -> Any:
        """The state after a pass, its queries answered: coded, and rid of what does not stay. After every `append`.

        leader: the state of the layer that `leads` this one, after its own pass. rules: how a state lies on a mesh."""
        return state

    def leads(self, layer: int) -> int | None:
        """The layer whose choice of tokens is that of `layer` too; None if it chooses for itself."""
        return None

    @abc.abstractmethod
    def read(self, state: Any, frequencies: Frequencies | None) -> tuple[Array, Array, TokenInfo]:
        """(rotated k [B,S,K,D], v [B,S,K,E], info) of every slot, for the reference and tests; empty slots have segment 0.

        Where each key head holds tokens of its own, it is a row: k [BK,S,1,D]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeysCache(Cache):
    """Base of caches that hold keys themselves, `rotated` where a key's angle never changes after it is written, else `raw` and
    rotated on read."""

    keys: Literal["rotated", "raw"] = "rotated"

    def held(self, k: Float[Array, "B T K D"], info: TokenInfo, frequencies: Frequencies | None) -> Float[Array, "B T K D"]:
        """Raw keys as they are held. Raises ValueError if they would be turned by a rope that turns them anew."""
        if self.keys == "raw" or frequencies is None:
            return k
        if frequencies.by_length:
            raise ValueError("cache.keys = 'rotated': expected 'raw', as this rope turns a key anew when its document grows")
        return rotate(k, info.positions, frequencies, side="key").astype(k.dtype)

    def turned(self, k: Float[Array, "B S K D"], info: TokenInfo, frequencies: Frequencies | None) -> Float[Array, "B S K D"]:
        """Keys as they are held, rotated."""
        if self.keys == "rotated" or frequencies is None:
            return k
        return rotate(k, info.positions, frequencies, info.lengths, side="key").astype(k.dtype)
