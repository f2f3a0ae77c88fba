"""The contract of an objective: `loss(model, batch, key) -> (total f32[], weight f32[], metrics)`, sums and never means.

The trainer adds totals and weights over devices and accumulation steps and divides once, so that neither packing, nor the
mesh, nor accumulation changes what is optimised (one normaliser).
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from lcx.batch import Batch
from lcx.spec import Spec

Sums = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Spec, abc.ABC):
    """Base of every objective. free: fields that only decide how the same numbers are computed; a run may change them."""

    free: ClassVar[tuple[str, ...]] = ()

    @property
    def drawn_ratios(self) -> Mapping[int, float] | None:
        """Ratios of beacons that it draws, with the share of windows of each; None where it draws none."""
        return None

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: Batch, key: Any) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        """(total, weight, sums): the sum to minimise, its normaliser, and further sums for `report`, all over `batch`.

        `sums` holds at least `loss_sum` and `weight`.
        """

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The figures to log, from the sums of one step or several: each divided by `weight`, `loss_sum` named `loss`."""
        weight = sums["weight"]
        return {name.removesuffix("_sum"): value / weight for name, value in sums.items() if name != "weight"}
