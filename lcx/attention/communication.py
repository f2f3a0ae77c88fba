"""How queries on one device meet keys on the others: a wrapper that turns a local fold into one over mesh axes.

A wrapped fold runs inside `shard_map` on the device's own queries and keys and is itself a fold, so wrappers nest: a ring over
slow links around a ring over fast ones, a ring inside all-to-alls. Layouts need no wrapper of their own: tokens carry what the
mask reads, and tiles that see nothing cost nothing.
"""

import abc
import dataclasses

from lcx.spec import Spec
from pallas_kernels.tile_attention.op import Fold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Communication(Spec, abc.ABC):
    """Base of every strategy of context parallelism."""

    @abc.abstractmethod
    def wrap(self, fold: Fold, axes: tuple[str, ...]) -> Fold:
        """The fold over the mesh axes that shard the sequence, outermost first; at least one, each of more than one device."""

    @property
    def whole_rows(self) -> bool:
        """Whether all keys of a row meet its queries at once."""
        return False

    @abc.abstractmethod
    def refusal(self, axes: dict[str, int], heads: int, kv_heads: int) -> str | None:
        """Why the strategy cannot work over mesh axes of these sizes with these heads on a device; None if it can."""


@dataclasses.dataclass(frozen=True)
class Wrapped(Fold):
    """Base of the folds that communicate: `inner` runs on what the exchange over the mesh axis brings together."""

    inner: Fold
    axis: str | tuple[str, ...]

    @property
    def mask(self):
        return self.inner.mask

    def shared_heads(self, axis):
        return dataclasses.replace(self, inner=self.inner.shared_heads(axis))

    @property
    def own(self) -> tuple[str, ...]:
        return (self.axis,) if isinstance(self.axis, str) else self.axis

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.own, *self.inner.axes)
