"""The contract of a selector: which pages of slots the query of a token reads. Nothing goes for good, as it does by a policy.

A page is `page` slots side by side. When tokens are written their pages are summarised; a query scores summaries, and meets the
slots of the best pages alone: a key head's queries the same ones. Passes of several tokens read all.
"""

import abc
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector(Spec, abc.ABC):
    """Base of every selector. page: slots. budget: slots that a query reads at most, in whole pages. group: what the queries of
    a key head are to a page, the sum of their scores or the largest. dense_layers: the first layers, which read all."""

    page: int = 32
    budget: int
    group: Literal["sum", "max"] = "max"
    dense_layers: int = 2

    def validate(self):
        self.check(self.page >= 1, "page", "at least 1 slot")
        self.check(self.budget >= self.page, "budget", f"at least a page of {self.page} slots")
        self.check(self.dense_layers >= 0, "dense_layers", "0 or more layers")

    @property
    def pages(self) -> int:
        """That a query reads."""
        return self.budget // self.page

    @abc.abstractmethod
    def summarise(self, k: Float[Array, "B K P page D"], there: Bool[Array, "B K P page"]) -> Any:
        """Arrays [B, K, P, ...] of pages of rotated keys; what is not there is anything."""

    @abc.abstractmethod
    def score(self, q: Float[Array, "B K g D"], summaries: Any) -> Float[Array, "B K g P"]:
        """Larger for pages to read rather; of a page with nothing, anything."""

    def chosen(
        self,
        q: Float[Array, "B K g D"],
        summaries: Any,
        seen: Bool[Array, "B G P"],
        newest: Bool[Array, "B G P"],
        axes: tuple[str, ...] = (),
    ) -> tuple[Any, Bool[Array, "B K n"]]:
        """(pages [B, K, n], which of them are read), n `pages` or all of them.

        seen: whether the query sees a token of a page; no other is read. newest: the page that is, whatever its score. axes: of
        the mesh, over whose devices pages are shared out, `pages` of all of them.
        """
        scores = self.score(q.astype(jnp.float32), summaries)
        scores = scores.sum(axis=2) if self.group == "sum" else scores.max(axis=2)
        scores = jnp.where(seen, jnp.where(newest, jnp.inf, scores), -jnp.inf)
        best, page = jax.lax.top_k(scores, min(self.pages, scores.shape[2]))
        read = best > -jnp.inf
        if axes:  # of pages that are worth as much the first, as on one device
            every = jax.lax.all_gather(best, axes, axis=2, tiled=True)
            first = jax.lax.top_k(every, min(self.pages, every.shape[2]))[1]
            own = jax.lax.axis_index(axes) * best.shape[2] + jnp.arange(best.shape[2])
            read = read & (own[:, None] == first[..., None, :]).any(axis=3)
        return page, read
