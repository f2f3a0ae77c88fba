"""A layer: a token mixer, a channel mixer, their norms and the residual form that joins them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.batch import Batch
from lcx.channels.channel import Channel
from lcx.mixers.mixer import Aux, Inherited, Mixer, Place
from lcx.models.residual import PreNorm, Residual
from lcx.norms import Norm, RMSNorm
from lcx.parallel.rules import shared_rows
from lcx.parallel.tokenwise import tokenwise, weights_of
from lcx.spec import Spec, SpecError


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
        self.spec, self.inherited = spec, inherited
        self.mixer = spec.mixer.build(inherited, rngs=rngs)
        self.channel = spec.channel.build(inherited, rngs=rngs)
        self.norms = nnx.List([spec.norm.build(inherited.width) for _ in range(spec.residual.norms)])
        if inherited.channel_chunk is not None:
            _check_chunks(self.channel, inherited)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        batch: Batch,
        state: Any = None,
        *,
        place: Place = Place(),
        between: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, Any, Aux]:
        """between: what the stream goes through behind the mixer and before the channel mixer, for forms `InParts`."""
        kept: dict[str, Any] = {}

        def mix(h):
            y, kept["state"], kept["mixer"] = self.mixer(h, batch, state, place=place)
            return y

        def channel(h):
            y, kept["channel"] = self._channel(h, batch.tokens)
            return y

        residual, norms = self.spec.residual, list(self.norms)
        if between is None:
            x = residual.join(x, mix, channel, norms)
        else:
            half = len(norms) // 2
            x = residual.add(between(residual.add(x, mix, norms[:half])), channel, norms[half:])
        return x, kept["state"], join_aux(kept["mixer"], kept["channel"])

    def _channel(self, h: Float[Array, "B T M"], tokens: Int[Array, "B T"]) -> tuple[Array, Aux]:
        """The channel mixer, over chunks of tokens where the model says so."""
        chunk, rules, compute = self.inherited.channel_chunk, self.inherited.rules, self.inherited.compute
        if chunk is None:
            return self.channel(h, tokens)
        mix = lambda channel, h, tokens: channel(h, tokens)[0]
        weights = weights_of(self.channel, mix, h, tokens)
        return tokenwise(mix, weights, h, tokens, chunk=chunk, rules=rules, compute=compute), {}

    def init_state(self, batch_size: int, length: int, layer: int | None = None) -> Any:
        """The empty state, its rows shared out over the ambient mesh. layer: of the model, where layers' states differ."""
        at = {} if layer is None else {"layer": layer}
        return shared_rows(self.mixer.init_state(batch_size, length, **at), self.inherited.rules)


def _check_chunks(channel: nnx.Module, inherited: Inherited) -> None:
    """Raises SpecError if the channel mixer reports on all tokens together, which chunks of them do not give."""
    x, tokens = jax.ShapeDtypeStruct((1, 1, inherited.width), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    _, aux = jax.eval_shape(channel, x, tokens)
    if aux:
        kind, names = type(channel).__name__, ", ".join(aux)
        chunk = f"Decoder.channel_chunk = {inherited.channel_chunk}"
        raise SpecError(f"{chunk}: expected None, since {kind} reports {names} over all tokens together")


def join_aux(*parts: Aux) -> Aux:
    """Auxiliary values of parts that stand side by side: losses are added, metrics averaged over the parts that have them."""
    joined: Aux = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = jnp.stack([part[key] for part in parts if key in part])
        joined[key] = values.sum() if key.endswith("_loss") else values.mean()
    return joined
