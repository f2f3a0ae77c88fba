"""Language modelling beside autoencoding: a text is told back from the vectors that stand for it (ICAE, Ge et al. 2023)."""

import dataclasses

import jax.numpy as jnp

from lcx.batch import PADDING
from lcx.objectives.language_modeling import LanguageModeling
from lcx.objectives.readout import readout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoding(LanguageModeling):
    """share: of autoencoding in the sum that is optimised; a token counts as much in either.

    Its figures are `loss`, of both, and `reconstruction`, nats a token that is told back.
    """

    share: float = 0.5

    def validate(self):
        super().validate()
        self.check(0 < self.share <= 1, "share", "above 0, at most 1")

    def loss(self, model, batch, key):
        """Raises ValueError for a model without an encoder."""
        hidden = model.autoencoded(batch)
        found = readout(model, hidden, jnp.asarray(batch.tokens), chunk=self.chunk, parts=self.parts)
        told = jnp.asarray(batch.info.segments) != PADDING
        count = told.sum().astype(jnp.float32)
        back = jnp.where(told, jnp.where(found.known, found.lse - found.target, jnp.nan), 0).sum()
        if self.share == 1:
            return back, count, {"loss_sum": back, "weight": count, "reconstruction_sum": back}
        total, weight, sums = super().loss(model, batch, key)
        other = 1 - self.share
        both = other * weight + self.share * count
        sums = {name: other * value for name, value in sums.items()}
        sums["loss_sum"] += self.share * back
        sums |= {"weight": both, "reconstruction_sum": back * both / jnp.maximum(count, 1)}
        return other * total + self.share * back, both, sums

    @classmethod
    def examples(cls):
        return (cls(), cls(share=1.0, chunk=3))
