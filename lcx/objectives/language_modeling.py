"""Language modelling: sum over t of w_t * (logsumexp(z_t) - z_t[target_t]), the head applied in chunks of tokens.

Logits exist for one chunk at a time, of tokens that a device holds, and are computed again in the backward pass.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.batch import Batch
from lcx.objectives.objective import Objective, Sums
from lcx.objectives.readout import Readout, readout


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling(Objective):
    """chunk: tokens of each row (of each device's share of it) whose logits exist at a time.

    parts: of the vocabulary, equal ones, whose head and its gradient a device holds at a time; more parts, less memory.
    z_loss: weight of logsumexp(z)^2 (PaLM, 2022); 0 leaves it out.
    """

    free = ("chunk", "parts")

    chunk: int = 1024
    parts: int = 1
    z_loss: float = 0.0

    def validate(self):
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        self.check(self.parts >= 1, "parts", "at least 1")
        self.check(self.z_loss >= 0, "z_loss", "0 or a positive weight")

    def loss(self, model: nnx.Module, batch: Batch, key: Any) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        """Sums over the batch. `loss_sum` is the cross-entropy alone; `correct` weighs tokens whose target has the top logit.

        Auxiliary losses of the model are per token: they enter the total times the weight, once. A weighted target outside
        the vocabulary makes the total NaN, which stops training. Raises ValueError if the batch has no targets or weights.
        """
        if batch.targets is None or batch.loss_weights is None:
            raise ValueError("language modelling: the batch needs targets and loss_weights; prompts have none")
        hidden, _, aux = model(batch)
        found = readout(model, hidden, batch.targets, chunk=self.chunk, parts=self.parts)
        sums = self._sums(found, batch.targets, batch.loss_weights.astype(jnp.float32))
        weight = sums["weight"]
        total = sums["loss_sum"] + self.z_loss * sums.get("z_sum", 0.0)
        total = total + weight * sum(value for name, value in aux.items() if name.endswith("_loss"))
        return total, weight, sums | {name: value * weight for name, value in aux.items()}

    def _sums(self, found: Readout, targets: Int[Array, "B T"], weights: Float[Array, "B T"]) -> Sums:
        loss = jnp.where(found.known, found.lse - found.target, jnp.nan)
        weigh = lambda value: jnp.where(weights != 0, weights * value, 0).sum()
        sums = {"loss_sum": weigh(loss), "weight": weights.sum(), "correct": weigh(found.top == targets)}
        return sums | ({"z_sum": weigh(found.lse**2)} if self.z_loss else {})

    def report(self, sums):
        figures = super().report(sums)
        return {"accuracy" if name == "correct" else name: value for name, value in figures.items()}

    @classmethod
    def examples(cls):
        return (cls(), cls(chunk=3, parts=2, z_loss=1e-3))
