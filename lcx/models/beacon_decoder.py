"""A decoder whose documents are read in windows, of which beacons stay (`Decoder.memory = ActivationBeacon(...)`).

Beacons are laid out among the tokens of a batch before the first layer, and left out of the hidden states behind the last.
`batch.side["ratios"] [B,T]` gives each token the ratio of its window, where training draws them; a ratio that is not the spec's
makes sense for whole rows alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import PADDING, Batch, TokenInfo, sum_before
from lcx.memory.activation_beacon import BeaconInfo, lay_out
from lcx.mixers.neighbours import resumed, torn
from lcx.models.decoder import Decoder, DecoderModel
from lcx.record import record


@record
class BeaconState:
    """index, segments: of the newest token."""

    decoder: Any
    index: Int[Array, "B"]
    segments: Int[Array, "B"]


class BeaconDecoderModel(DecoderModel):
    """Parameters are the decoder's, `memory`, and those of beacons in its attention."""

    def __init__(self, spec: Decoder, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        spec.check(
            spec.position_table is None, "position_table", "None beside an ActivationBeacon, in which positions begin anew"
        )
        like = spec.memory.like
        spec.memory.check(like is None or like < spec.vocab, "like", f"a token below vocab = {spec.vocab}, or None")
        self.memory = spec.memory.build(spec.width, rngs=rngs)

    def __call__(self, batch: Batch, state: Any = None, *, upto: int | None = None):
        """Hidden states after the final norm; with `upto`, the raw stream of the tokens after that many layers. Raises
        ValueError for ratios beside a state."""
        batch, spec = jax.tree.map(jnp.asarray, batch), self.spec.memory
        ratios = batch.side.get("ratios")
        if state is None:
            ratio = spec.ratio if ratios is None else spec.smallest
            beacons = spec.beacons(batch.shape[1], whole=True, ratio=ratio)
            info = lay_out(spec, batch.info, beacons, ratios)
            hidden, _, aux = super().__call__(self._laid(batch, info), upto=upto)
            broken = torn(batch.info, within=False) | self._unknown(batch.info, ratios)
            return self._marked(hidden[:, : info.raw], broken), None, aux
        if ratios is not None:
            raise ValueError("decoder.memory: ratios in a batch beside a state: expected that of the spec")
        length = batch.shape[1]
        info = lay_out(spec, batch.info, spec.beacons(length, whole=False, ratio=spec.ratio))
        if length > 1:
            hidden, decoder, aux = super().__call__(self._laid(batch, info), state.decoder, upto=upto)
        else:
            first, behind = info.part(slice(0, 1), 1), info.part(slice(1, None), 0)
            hidden, decoder, aux = super().__call__(self._laid(batch, first), state.decoder, upto=upto)
            close = lambda decoder: super(BeaconDecoderModel, self).__call__(self._laid(None, behind), decoder)[1]
            decoder = jax.lax.cond((behind.segments != PADDING).any(), close, lambda decoder: decoder, decoder)
        broken, index, segments = resumed(batch.info, state.index, state.segments, within=False)
        return self._marked(hidden[:, :length], broken), BeaconState(decoder=decoder, index=index, segments=segments), aux

    def init_state(self, batch_size, length):
        none = jnp.zeros(batch_size, jnp.int32)
        return BeaconState(decoder=super().init_state(batch_size, length), index=none, segments=none)

    def _entered(self, batch, state, place):
        """The embeddings' mixer reads the text alone, as it stands."""
        if self.embed_mixer is None:
            return self._embed(batch), None
        raw = batch.info.raw
        if not raw:
            return self._embed(batch), state
        text = Batch(tokens=batch.tokens[:, :raw], info=batch.side["text"], embeds=batch.embeds[:, :raw])
        x, state = super()._entered(text, state, place)
        beacons = dataclasses.replace(batch, tokens=batch.tokens[:, raw:], embeds=batch.embeds[:, raw:])
        return jnp.concatenate([x, self._embed(beacons)], axis=1), state

    def _laid(self, batch: Batch | None, info: BeaconInfo) -> Batch:
        """Tokens of the batch, if any, and beacons behind them."""
        beacon, like = self.memory.embedding[0], self.spec.memory.like
        if like is not None:
            beacon = beacon + self.spec.embed_scale * self.embedding[like]
        rows, length = info.shape
        tokens = jnp.full((rows, length - info.raw), -1, jnp.int32)
        embeds = jnp.broadcast_to(beacon, (rows, length, len(beacon)))
        if batch is not None:
            tokens = jnp.concatenate([batch.tokens, tokens], axis=1)
            if batch.embeds is not None:
                embeds = embeds.at[:, : info.raw].set(batch.embeds.astype(embeds.dtype))
        return Batch(tokens=tokens, info=info, embeds=embeds, side={} if batch is None else {"text": batch.info})

    def _unknown(self, info: TokenInfo, ratios) -> Bool[Array, "B T"]:
        """Tokens of a window whose ratio is not the spec's, or, where 0 is not, behind one of ratio 0."""
        if ratios is None:
            return jnp.zeros(info.shape, bool)
        spec = self.spec.memory
        known = jnp.isin(ratios, jnp.asarray(sorted({spec.ratio, *spec.ratios, 0})))
        gone = (ratios == 0) & (info.index % spec.window == spec.window - 1) & (0 not in spec.ratios)
        return ~known | (sum_before(gone.astype(jnp.int32), info.segments) > 0)

    def _marked(self, hidden: Float[Array, "B T M"], broken) -> Float[Array, "B T M"]:
        return jnp.where(broken[..., None], jnp.nan, hidden)
