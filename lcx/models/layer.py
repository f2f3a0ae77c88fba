"""A layer: a token mixer, a channel mixer, their norms and the residual form that joins them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcx.batch import Batch
from lcx.channels.channel import Channel
from lcx.mixers.mixer import Aux, Inherited, Mixer
from lcx.models.residual import PreNorm, Residual
from lcx.norms import Norm, RMSNorm
from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer(Spec):
    """mixer: over tokens. channel: over channels. norm: which norm; residual: how many of them, and where."""

    mixer: Mixer
    channel: Channel
    norm: Norm = RMSNorm()
    residual: Residual = PreNorm()

    def build(self, inherited: Inherited, *, rngs: nnx.Rngs) -> "LayerModule":
        return LayerModule(self, dataclasses.replace(inherited, gain=inherited.gain * self.residual.gain), rngs)


class LayerModule(nnx.Module):
    def __init__(self, spec: Layer, inherited: Inherited, rngs: nnx.Rngs):
        self.spec = spec
        self.mixer = spec.mixer.build(inherited, rngs=rngs)
        self.channel = spec.channel.build(inherited, rngs=rngs)
        self.norms = nnx.List([spec.norm.build(inherited.width) for _ in range(spec.residual.norms)])

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None) -> tuple[Array, Any, Aux]:
        kept: dict[str, Any] = {}

        def mix(h):
            y, kept["state"], kept["mixer"] = self.mixer(h, batch, state)
            return y

        def channel(h):
            y, kept["channel"] = self.channel(h, batch.tokens)
            return y

        x = self.spec.residual.join(x, mix, channel, list(self.norms))
        return x, kept["state"], join_aux(kept["mixer"], kept["channel"])

    def init_state(self, batch_size: int, length: int) -> Any:
        return self.mixer.init_state(batch_size, length)


def join_aux(*parts: Aux) -> Aux:
    """Auxiliary values of parts that stand side by side: losses are added, metrics averaged over the parts that have them."""
    joined: Aux = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = jnp.stack([part[key] for part in parts if key in part])
        joined[key] = values.sum() if key.endswith("_loss") else values.mean()
    return joined
