"""Language modelling with the ratios of an Activation Beacon drawn anew in each step (Zhang et al. 2024).

As published, the last window of a document has no beacons, though tokens that stand among beacons read those of their own
window wherever they are used. Tokens of a document's first window have no loss, as they see no beacon, unless beacons stand
among them.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.batch import Batch, document_lengths
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.objectives.language_modeling import LanguageModeling


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeaconModeling(LanguageModeling):
    """ratios: to draw from, with these weights; None is evenly. each: what has one."""

    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)
    weights: tuple[float, ...] | None = None
    each: Literal["row", "window"] = "window"

    def validate(self):
        super().validate()
        self.check(len(self.ratios) >= 1, "ratios", "at least one")
        self.check(all(ratio >= 0 for ratio in self.ratios) and any(self.ratios), "ratios", "0 or positive, not all 0")
        many = self.weights is None or (len(self.weights) == len(self.ratios) and min(self.weights) >= 0 < sum(self.weights))
        self.check(many, "weights", f"None, or a weight for each of ratios = {self.ratios}")

    @property
    def drawn_ratios(self):
        weights = self.weights or (1.0,) * len(self.ratios)
        shares: dict[int, float] = {}
        for ratio, weight in zip(self.ratios, weights, strict=True):
            shares[ratio] = shares.get(ratio, 0.0) + weight / sum(weights)
        return shares

    def loss(self, model, batch, key):
        """Raises ValueError for a model without beacons."""
        memory = model.spec.memory
        if not isinstance(memory, ActivationBeacon):
            raise ValueError("beacon modelling: expected a model whose memory is an ActivationBeacon")
        if missing := {*self.ratios} - {memory.ratio, *memory.ratios}:
            raise ValueError(f"beacon modelling: ratios = {self.ratios}: the model's memory has no {sorted(missing)}")
        batch = dataclasses.replace(batch, side={**batch.side, "ratios": self.drawn(memory, batch, key)})
        if batch.loss_weights is not None and not memory.first_has_loss:
            behind = jnp.where(batch.info.index >= memory.window, batch.loss_weights, 0)
            batch = dataclasses.replace(batch, loss_weights=behind)
        return super().loss(model, batch, key)

    def drawn(self, memory: ActivationBeacon, batch: Batch, key) -> Int[Array, "B T"]:
        """The ratio of each token's window."""
        info, W = batch.info, memory.window
        window = jnp.asarray(info.index) // W
        room = batch.shape[1] // W + 1 if self.each == "window" else 1
        chances: Float[Array, "n"] = jnp.asarray(self.weights or (1.0,) * len(self.ratios))
        chances = chances / chances.sum()
        table = jax.random.choice(key, jnp.asarray(self.ratios, jnp.int32), (len(window), room), p=chances)
        ratios = jnp.take_along_axis(table, (window + info.segments) % room, axis=1)
        last = window == (document_lengths(info) - 1) // W
        return jnp.where(last, 0, ratios)

    @classmethod
    def examples(cls):
        return (cls(ratios=(2,)), cls(ratios=(2, 4, 0), weights=(1.0, 1.0, 0.5), each="row", chunk=3))
