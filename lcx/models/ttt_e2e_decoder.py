"""A decoder whose last layers train themselves on what they read (`Decoder.memory = TTTE2E(...)`).

The layers before them read whole rows at once. The last ones, the suffix, read chunk after chunk, with fast weights of each row
and the keys and values of the window before. The next tokens that a chunk is trained on stand in the row: the step behind it is
needed where its document goes on, and then they are all there. So documents of a row know nothing of each other, and a token
sees nothing that stands behind it.

The backward pass keeps of the suffix what some chunks begin with; a decoder's `remat` and `unroll` are of the layers before it.

In generation a whole chunk waits for the token behind it: a state holds what the suffix was given for the open chunk, and takes
the step when that token comes, for the rows whose turn it is.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import PADDING, Batch, TokenInfo
from lcx.cache.dense import newest, without_newest
from lcx.memory.document_chunks import document_chunks
from lcx.memory.ttt_e2e import Fast, PrimeModule, stepped
from lcx.mixers.mixer import Aux, Inherited, Place
from lcx.mixers.neighbours import resumed, torn
from lcx.models.decoder import Decoder, DecoderModel, over_layers
from lcx.models.layer import join_aux
from lcx.models.ttt_e2e_fit import unfit
from lcx.record import record
from lcx.spec import SpecError
from pallas_kernels.grouped_scan import chosen, grouped_scan


class Part(NamedTuple):
    """Tokens with what the layers before the suffix made of them."""

    x: Float[Array, "*n B C M"]
    tokens: Int[Array, "*n B C"]
    info: TokenInfo

    @property
    def real(self) -> Bool[Array, "*n B C"]:
        return self.info.segments != PADDING


@record
class TTTE2EState:
    """decoder: of the layers before the suffix. fast: weights at the start of the open chunk, whose `filled` tokens are
    `opened`, and the newest in `caches`. index, segments: of the newest token."""

    decoder: Any
    fast: Any
    caches: Any
    opened: Any
    filled: Int[Array, "B"]
    index: Int[Array, "B"]
    segments: Int[Array, "B"]


class TTTE2EDecoderModel(DecoderModel):
    """Parameters are the decoder's, and `memory`: an MLP for each layer of the suffix, stacked as the layers are."""

    def __init__(self, spec: Decoder, rngs: nnx.Rngs):
        for sentence in unfit(spec):
            raise SpecError(sentence)
        super().__init__(spec, rngs)
        self.prefix = spec.periods - spec.memory.suffix // len(spec.pattern)
        self.memory = nnx.List([_primes(spec, slot, spec.periods - self.prefix, rngs) for slot in range(len(spec.pattern))])

    def __call__(self, batch: Batch, state: Any = None, *, upto: int | None = None):
        """Hidden states after the final norm; with `upto`, the raw stream after that many layers, none of them of the suffix.
        Raises ValueError for more."""
        if upto is not None:
            if upto > self.prefix * len(self.spec.pattern):
                raise ValueError(f"decoder: upto = {upto}: expected none of the last {self.spec.memory.suffix} layers")
            return super().__call__(batch, state, upto=upto)
        batch = self._with_lengths(batch, state)
        return self._whole_rows(batch) if state is None else self._more(batch, state)

    def _whole_rows(self, batch: Batch):
        spec, info = self.spec.memory, batch.info
        x, _, above = self._stream(batch, None, self.prefix)
        chunks = document_chunks(info, spec.chunk, self.spec.documents)
        parts = jax.tree.map(chunks.cut, _part(x, batch))
        begins, some = chunks.begins.T, chunks.count.T > 0
        behind = lambda y: jnp.concatenate([y[1:], jnp.zeros_like(y[:1])])
        goes_on = behind(some & ~begins)
        after = behind(parts.tokens[:, :, 0])
        rows = len(x)
        first = self._start(rows), self._no_keys(rows)

        def step(carried, given):
            part, after, begins, goes_on, work = given

            def run(carried, read):
                fast, caches = _chosen(begins, first, carried)
                fast, hidden, caches, aux = read(fast, part, caches)
                return (fast, self._kept(caches)), (hidden, aux)

            def reading(fast, part, caches):
                return fast, *self._suffix(fast, part, caches)

            learning = functools.partial(self._learned, after=after, rows=goes_on)
            shapes = jax.eval_shape(lambda: run(carried, reading)[1])
            nothing = lambda carried: (carried, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes))
            return jax.lax.switch(work, [nothing, lambda c: run(c, reading), lambda c: run(c, learning)], carried)

        learns = goes_on.any(axis=1) & (spec.rate > 0)
        given = parts, after, begins, goes_on, chunks.live.astype(jnp.int32) + learns
        n = len(after)
        group = min(n, spec.bptt or (1 if n <= 4 else round(n**0.5)))  # of 4, groups would keep as many states
        given = jax.tree.map(lambda y: jnp.pad(y, [(0, -n % group)] + [(0, 0)] * (y.ndim - 1)), given)  # all groups alike
        options = {"group": group, "truncated": spec.bptt is not None, "again": group > 1}
        hidden, aux = jax.tree.map(lambda y: y[:n], grouped_scan(step, first, given, **options)[1])
        aux = jax.tree.map(lambda y: y.sum() / jnp.maximum(chunks.live.sum(), 1), aux)
        return jnp.where(torn(info, within=False)[..., None], jnp.nan, chunks.join(hidden)), None, self._aux(above, aux)

    def _more(self, batch: Batch, state: TTTE2EState):
        info, size = batch.info, self.spec.memory.chunk
        x, decoder, above = self._stream(batch, state.decoder, self.prefix)
        part, lost = _part(x, batch), None
        if batch.shape[1] == 1:
            parts, begins = jax.tree.map(lambda y: y[None], part), (part.real & (info.index == 0)).T
            join = lambda y: y[0]
        else:
            chunks = document_chunks(info, size, self.spec.documents, state.filled)
            parts, begins, join, lost = jax.tree.map(chunks.cut, part), chunks.begins.T, chunks.join, chunks.lost
        carried = state.fast, state.caches, state.opened, state.filled
        carried, (hidden, aux) = jax.lax.scan(self._piece, carried, (parts, begins))
        broken, index, segments = resumed(info, state.index, state.segments, within=False, lost=lost)
        hidden = jnp.where(broken[..., None], jnp.nan, join(hidden))
        fast, caches, opened, filled = carried
        marks = {"filled": filled, "index": index, "segments": segments}
        state = TTTE2EState(decoder=decoder, fast=fast, caches=caches, opened=opened, **marks)
        return hidden, state, self._aux(above, jax.tree.map(lambda y: y.mean(), aux))

    def _piece(self, carried, given):
        """Tokens of one chunk of each row; where the chunk before them is whole, its step first."""
        part, begins = given
        rows, size = part.tokens.shape[0], self.spec.memory.chunk

        def read(carried):
            fast, caches, opened, filled = carried
            fast, caches = _chosen(begins, (self._start(rows), self._no_keys(rows)), (fast, caches))
            filled = jnp.where(begins, 0, filled)
            whole = (filled == size) & part.real.any(axis=1)
            step = functools.partial(self._closed, opened, after=part.tokens[:, 0], whole=whole)
            fast, caches = jax.lax.cond(whole.any(), step, lambda *same: same, fast, caches)
            hidden, caches, aux = self._suffix(fast, part, caches)
            slot = jnp.where(part.real, part.info.index % size, size)
            write = lambda old, new: old.at[jnp.arange(rows)[:, None], slot].set(new, mode="drop")
            filled = jnp.where(whole, 0, filled) + part.real.sum(axis=1, dtype=jnp.int32)
            return (fast, caches, jax.tree.map(write, opened, part), filled), (hidden, aux)

        shapes = jax.eval_shape(lambda: read(carried)[1])
        nothing = lambda carried: (carried, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes))
        return jax.lax.cond(part.real.any(), read, nothing, carried)

    def _closed(self, opened: Part, fast, caches, *, after: Int[Array, "B"], whole: Bool[Array, "B"]):
        """Weights and keys behind the open chunk, in the rows where it is whole."""
        info = dataclasses.replace(opened.info, segments=jnp.where(whole[:, None], opened.info.segments, PADDING))
        count = jnp.where(whole, self.spec.memory.chunk, 0)
        before = tuple(jax.vmap(without_newest, (0, None))(cache, count) for cache in caches)
        learned, _, read, _ = self._learned(fast, opened._replace(info=info), before, after=after, rows=whole)
        return _chosen(whole, (learned, self._kept(read)), (fast, caches))

    def _learned(self, fast, part: Part, caches, *, after: Int[Array, "B"], rows: Bool[Array, "B"]):
        """(weights behind a step, hidden states, caches, aux) of a whole chunk. after: the token behind it; rows: where the
        step is taken."""
        targets = jnp.concatenate([part.tokens[:, 1:], after[:, None]], axis=1)
        counted = rows[:, None] & part.real & (targets >= 0) & (targets < self.spec.vocab)

        def loss(fast, model, part, caches):
            hidden, caches, aux = model._suffix(fast, part, caches)
            logits = model.logits(hidden)
            own = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(axis=-1)
            losses = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - own, 0)
            return (losses.sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)).sum(), (hidden, caches, aux)

        if self.spec.memory.first_order:
            found = self._suffix(fast, part, caches)
            gradient, _ = jax.grad(loss, has_aux=True)(*jax.lax.stop_gradient((fast, self, part, caches)))
        else:
            gradient, found = jax.grad(loss, has_aux=True)(fast, self, part, caches)
        return stepped(self.spec.memory, fast, gradient), *found

    def _suffix(self, fast, part: Part, caches):
        """(hidden states after the final norm, caches with its keys, aux) of tokens of one chunk."""
        batch = Batch(tokens=part.tokens, info=part.info)
        slots = jax.tree.map(lambda p: p[self.prefix :], tuple(self.slots))
        if not self.spec.memory.first_order:
            for slot in slots:
                slot.mixer.spec = dataclasses.replace(slot.mixer.spec, backend="reference")

        def period(x, stacked):
            blocks, primes, fast, caches, first = stacked
            held, found = [], []
            for slot, (block, prime, own, cache) in enumerate(zip(blocks, primes, fast, caches, strict=True)):
                mlp = functools.partial(prime, fast=own)
                between = functools.partial(block.spec.residual.add, step=mlp, norms=list(prime.norms))
                x, cache, aux = block(x, batch, cache, place=Place(layer=first + slot), between=between)
                held.append(cache)
                found.append(aux)
            return x, (tuple(held), join_aux(*found))

        first = jnp.arange(self.prefix, self.spec.periods, dtype=jnp.int32) * len(slots)
        x, (caches, aux) = jax.lax.scan(period, part.x, (slots, tuple(self.memory), fast, caches, first))
        return self.final_norm(x), caches, over_layers(aux)

    def _aux(self, above: Aux, suffix: Aux) -> Aux:
        """Of all layers: losses are added, metrics averaged."""
        share = (self.spec.periods - self.prefix) / self.spec.periods
        if share == 1:
            return suffix
        mean = lambda key: (1 - share) * above[key] + share * suffix[key]
        return {key: above[key] + suffix[key] if key.endswith("_loss") else mean(key) for key in suffix}

    def _start(self, rows: int) -> tuple[Fast, ...]:
        return tuple(jax.vmap(lambda prime: prime.start(rows))(prime) for prime in self.memory)

    def _no_keys(self, rows: int):
        """Empty caches of the suffix, with room for a window and a chunk."""
        room = lambda slot: slot.spec.mixer.mask.size - 1 + self.spec.memory.chunk
        stack = lambda leaf: jnp.broadcast_to(leaf, (self.spec.periods - self.prefix, *leaf.shape))
        first = [jax.tree.map(lambda p: p[0], slot) for slot in self.slots]
        return tuple(jax.tree.map(stack, slot.init_state(rows, room(slot))) for slot in first)

    def _kept(self, caches):
        """Of whole chunks, what the next one sees."""
        sizes = [layer.mixer.mask.size - 1 for layer in self.spec.pattern]
        return tuple(jax.vmap(functools.partial(newest, count=n))(cache) for n, cache in zip(sizes, caches, strict=True))

    def init_state(self, batch_size, length):
        none = jnp.zeros(batch_size, jnp.int32)
        whole = super().init_state(batch_size, length)
        cut = lambda leaf: leaf[: self.prefix]
        return TTTE2EState(
            decoder={"embed": whole["embed"], "layers": jax.tree.map(cut, whole["layers"])},
            fast=self._start(batch_size),
            caches=self._no_keys(batch_size),
            opened=self._nothing_open(batch_size),
            **dict.fromkeys(("filled", "index", "segments"), none),
        )

    def _nothing_open(self, rows: int) -> Part:
        shape = rows, self.spec.memory.chunk
        none = jnp.zeros(shape, jnp.int32)
        ropes = [self.spec.rope_of(layer.mixer) for layer in self.spec.pattern]
        axes = max(1, *(len(rope.sections) for rope in ropes if rope is not None), 0)
        positions = jnp.zeros((*shape, axes), jnp.float32)
        info = TokenInfo(index=none, order=none, positions=positions, segments=none, roles=none, lengths=none)
        return Part(jnp.zeros((*shape, self.spec.width), self.spec.compute), none, info)


def _part(x: Float[Array, "B T M"], batch: Batch) -> Part:
    info, none = batch.info, jnp.zeros_like(batch.tokens)
    absent = {name: none for name in ("roles", "lengths") if getattr(info, name) is None}
    return Part(x, batch.tokens, dataclasses.replace(info, **absent))


def _chosen(rows: Bool[Array, "B"], those: Any, others: Any) -> Any:
    """`chosen` where layers are stacked in front."""
    return jax.vmap(functools.partial(chosen, rows))(those, others)


def _primes(spec: Decoder, slot: int, periods: int, rngs: nnx.Rngs):
    """The MLPs of one slot of the pattern, stacked [periods, ...]."""
    residual = spec.pattern[slot].residual
    inherited = Inherited(
        width=spec.width, depth=spec.depth, rope=spec.rope, compute=spec.compute, rules=spec.rules, gain=residual.gain
    )

    @nnx.split_rngs(splits=periods)
    @nnx.vmap(axis_size=periods, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def build(rngs: nnx.Rngs):
        return PrimeModule(spec.memory.hidden, spec.pattern[slot].norm, residual.norms // 2, inherited, rngs)

    return build(rngs)
