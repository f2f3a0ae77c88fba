"""A decoder of texts in which gist tokens stand for what is before them (`Decoder.memory = Gist(...)`).

`compressed` leaves of a state the gists alone: a prompt is read once, and many texts may go on behind it, each as if the prompt
were there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from lcx.batch import PADDING, Batch, TokenInfo, sum_before
from lcx.cache.dense import DenseState
from lcx.memory.gist import AFTER, BEFORE, GIST
from lcx.mixers.neighbours import BROKEN, resumed, torn
from lcx.models.decoder import Decoder, DecoderModel
from lcx.record import record


@record
class GistState:
    """gists: of the newest document. told: its tokens up to the last of them. closed: whether its prompt is there no more.
    index, segments: of the newest token."""

    decoder: Any
    gists: Int[Array, "B"]
    told: Int[Array, "B"]
    closed: Bool[Array, "B"]
    index: Int[Array, "B"]
    segments: Int[Array, "B"]


class GistDecoderModel(DecoderModel):
    """Parameters are the decoder's."""

    def __init__(self, spec: Decoder, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        spec.memory.check(spec.memory.token < spec.vocab, "token", f"a token below vocab = {spec.vocab}")

    def __call__(self, batch: Batch, state: Any = None, *, upto: int | None = None):
        batch = jax.tree.map(jnp.asarray, batch)
        info = batch.info
        gist, after, told, twice = self._told(batch, state)
        roles = jnp.where(gist, GIST, jnp.where(after, AFTER, BEFORE))
        side = {"text": self._apart(info, after, told)}
        given = dataclasses.replace(batch, info=dataclasses.replace(info, roles=roles), side=side)
        hidden, decoder, aux = super().__call__(given, None if state is None else state.decoder, upto=upto)
        if state is None:
            broken = torn(info, within=False) | (sum_before(twice.astype(jnp.int32), info.segments) + twice > 0)
            return jnp.where(broken[..., None], jnp.nan, hidden), None, aux
        broken, index, segments = resumed(info, state.index, state.segments, within=False, lost=twice)
        mine = (info.segments == segments[:, None]) & (info.segments != PADDING)
        begun = (segments != state.segments) | (mine & (info.index == 0)).any(axis=1)
        count = lambda what, held: (mine & what).sum(axis=1, dtype=jnp.int32) + jnp.where(begun, 0, held)
        state = GistState(
            decoder=decoder,
            gists=count(gist, state.gists),
            told=count(~after, state.told),
            closed=state.closed & ~begun,
            index=index,
            segments=segments,
        )
        return jnp.where(broken[..., None], jnp.nan, hidden), state, aux

    def init_state(self, batch_size, length):
        none = jnp.zeros(batch_size, jnp.int32)
        decoder = super().init_state(batch_size, length)
        return GistState(decoder=decoder, gists=none, told=none, closed=none > 0, index=none, segments=none)

    def compressed(self, state: GistState, *, gists: int, room: int) -> GistState:
        """The state of its gists alone, with room for `room` tokens more. Rows whose newest token is not the last of one to
        `gists` of them cannot be answered, and so are gists that follow. Raises ValueError where tokens see the prompt as well.
        """
        if self.spec.memory.control == "positive":
            raise ValueError("decoder.memory.control = 'positive': expected 'gist' or 'negative', where a prompt is not seen")

        def of_layer(held: DenseState) -> DenseState:
            mine = (held.info.roles == GIST) & (held.info.segments == state.segments[:, None]) & (held.info.segments != PADDING)
            order = jnp.argsort(~mine, axis=1, stable=True)[:, :gists]
            there = jnp.take_along_axis(mine, order, axis=1)

            def moved(x):
                wide = (slice(None), slice(None), *[None] * (x.ndim - 2))
                kept = jnp.where(there[wide], jnp.take_along_axis(x, order[wide], axis=1), 0)
                return jnp.pad(kept, ((0, 0), (0, room + gists - kept.shape[1])) + ((0, 0),) * (x.ndim - 2))

            used = there.sum(axis=1, dtype=jnp.int32)
            return DenseState(
                k=moved(held.k), v=moved(held.v), info=jax.tree.map(moved, held.info), used=used, overflow=held.overflow
            )

        layers = tuple(jax.vmap(of_layer)(held) for held in state.decoder["layers"])
        fits = (state.gists >= 1) & (state.gists <= gists) & (state.index >= 0) & (state.index + 1 == state.told)
        closed = jnp.ones_like(state.closed)
        decoder = {**state.decoder, "layers": layers}
        return dataclasses.replace(state, decoder=decoder, closed=closed, index=jnp.where(fits, state.index, BROKEN))

    def _entered(self, batch, state, place):
        """The embeddings' mixer reads what is behind gists as a text of its own."""
        return super()._entered(dataclasses.replace(batch, info=batch.side["text"]), state, place)

    def _told(self, batch: Batch, state: GistState | None):
        """(gists, tokens behind gists, tokens of a document up to its last gist before each, gists of a second run)."""
        info = batch.info
        real = info.segments != PADDING
        gist = real & (batch.tokens == self.spec.memory.token)

        def before(what, held):
            """How many stand before each token in its document, those that were read earlier among them."""
            found = sum_before(what.astype(jnp.int32), info.segments)
            if state is None:
                return found
            begun = sum_before((real & (info.index == 0)).astype(jnp.int32), info.segments) + (info.index == 0) > 0
            return found + jnp.where((info.segments == state.segments[:, None]) & ~begun, held[:, None], 0)

        held = (None, None, None)
        if state is not None:
            behind = jnp.where(state.gists > 0, state.index + 1 - state.told, 0)
            held = state.gists, state.told, jnp.where(state.closed, 1, behind)
        plain = real & ~gist & (before(gist, held[0]) > 0)
        twice = gist & (before(plain, held[2]) > 0)
        after = plain | twice
        return gist, after, before(real & ~after, held[1]), twice

    def _apart(self, info: TokenInfo, after: Bool[Array, "B T"], told: Int[Array, "B T"]) -> TokenInfo:
        """The text cut in two behind its gists, each part counted from 0, unless all of it is seen."""
        if self.spec.memory.hides is None:
            return info
        index = jnp.where(after, info.index - told, info.index)
        segments = jnp.where(info.segments == PADDING, PADDING, 2 * info.segments + after)
        return dataclasses.replace(info, index=index, order=index, segments=segments)
