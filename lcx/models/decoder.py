"""The decoder: token embedding, a repeating pattern of layers scanned over its periods, a final norm and a head.

Parameters of each slot of the pattern are stacked [periods, ...], so compile time does not grow with depth. Every model of
the project is called as this one is: `model(batch, state=None, upto=None) -> (hidden, state, aux)` and `model.logits(hidden)`.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lcx.attention.all_gather import AllGather
from lcx.attention.communication import Communication
from lcx.batch import Batch, lengths_of
from lcx.cache.layered import in_layers, of_layer
from lcx.linear import GradientSum, wide_product
from lcx.lora import OF_ATTENTION, LoRA
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.model_memory import ModelMemory
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Aux, Compute, Inherited, Mixer, Place, weight
from lcx.models.embedding import lookup
from lcx.models.layer import Layer, join_aux
from lcx.models.position_table import PositionTable
from lcx.models.words import check_known
from lcx.norms import Norm, RMSNorm
from lcx.parallel.rules import Rules, shard, shared_rows
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import length_policy
from lcx.positions.rope import Rope
from lcx.spec import Spec, SpecError, below
from pallas_kernels.tile_attention.op import SAVED

STREAM = "stream"  # the checkpoint name of what enters a period of layers

_policies = jax.checkpoint_policies
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "attention": _policies.save_only_these_names(SAVED),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[STREAM, SAVED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(Spec):
    """vocab: rows of the embedding, at least the tokenizer's size. pattern: one period of layers; depth is periods times it.

    rope: the rule of every attention layer that says `rope="model"`; None is NoPE. position_table and embed_mixer: added to the
    embeddings.
    head: `tied` to the embedding or `untied`. logit_softcap: cap * tanh(logits / cap). remat: what the backward pass keeps of
    each period: all (`none`), nothing but its input (`full`), its input and matrix products (`dots`), or its input and what
    attention gave, so that no ring runs again (`attention`; `offload` keeps the same two on the host). channel_chunk:
    tokens of each row of a device that channel mixers see at a time, forward and backward; None is all. unroll: periods a scan
    step, or `all` of them (faster on a CPU, longer to compile). rules, communication: how the model lies on a mesh, and how
    queries meet keys where the sequence is sharded. gradient_sum: what devices sum the gradients of projections in, `compute`
    or float32, which sends twice the bytes of bfloat16 (docs/numerics.md). documents: the most that a row holds; only mixers
    that count chunks from a document's start, and some kinds of `memory`, make room for them. memory: the model reads segment
    after segment, window after window or chunk after chunk, and this is what it knows of those before. lora: thin additions to
    projections of all layers.
    """

    vocab: int
    width: int
    pattern: tuple[Layer, ...]
    periods: int
    rope: FrequencyRule | None = Rope()
    position_table: PositionTable | None = None
    embed_mixer: Mixer | None = None
    embed_scale: float = 1.0
    final_norm: Norm = RMSNorm()
    head: Literal["tied", "untied"] = "tied"
    logit_softcap: float | None = None
    compute: Compute = "float32"
    remat: Literal["none", "full", "dots", "attention", "offload"] = "none"
    channel_chunk: int | None = None
    unroll: int | Literal["all"] = 1
    rules: Rules = Rules()
    communication: Communication = AllGather()
    gradient_sum: GradientSum = "compute"
    documents: int = 1
    memory: ModelMemory | None = None
    lora: LoRA | None = None

    def validate(self):
        for field in ("vocab", "width", "periods", "documents"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(0 < self.embed_scale < math.inf, "embed_scale", "a positive number")
        self.check(len(self.pattern) >= 1, "pattern", "at least one layer")
        self.check(self.logit_softcap is None or self.logit_softcap > 0, "logit_softcap", "a positive number or None")
        self.check(self.channel_chunk is None or self.channel_chunk >= 1, "channel_chunk", "at least 1 token, or None")
        divides = self.unroll == "all" or (self.unroll >= 1 and self.periods % self.unroll == 0)
        self.check(divides, "unroll", f"'all', or a divisor of periods = {self.periods}")

        if self.lora is not None:
            self._check_lora(self.lora)

    def _check_lora(self, lora: LoRA) -> None:
        of_channels = [name for name in lora.projections if name not in OF_ATTENTION]
        for n, layer in enumerate(self.pattern):
            if len(of_channels) < len(lora.projections):
                plain = type(layer.mixer) is Attention and not isinstance(self.memory, ActivationBeacon)
                self.check(plain, "lora", f"projections of channels alone: pattern[{n}].mixer is no plain attention")
            there = set(of_channels) <= set(layer.channel.matrices)
            self.check(there, "lora", f"projections that pattern[{n}].channel has: {', '.join(layer.channel.matrices)}")
        whole = self.memory is None or lora.dropout == 0
        self.check(whole, "lora", "no dropout beside memory, whose segments would all leave out the same")
        whole = self.channel_chunk is None or not of_channels or lora.dropout == 0
        self.check(whole, "channel_chunk", "None beside lora.dropout in channels, whose chunks would all leave out the same")

    def rope_of(self, mixer: Attention) -> FrequencyRule | None:
        """The rule by which one of the model's attention mixers rotates; None where it does not."""
        if mixer.rope == "none":
            return None
        return self.rope if mixer.rope == "model" else mixer.rope

    @property
    def depth(self) -> int:
        return self.periods * len(self.pattern)

    def build(self, *, rngs: nnx.Rngs) -> "DecoderModel":
        from lcx.models.with_memory import decoder_with_memory

        return DecoderModel(self, rngs) if self.memory is None else decoder_with_memory(self, rngs)


class DecoderModel(nnx.Module):
    @property
    def CAST(self) -> tuple[str, ...]:
        """Parameters that are read in `compute` alone (`light`)."""
        return ("head",) if self.spec.embed_scale != 1.0 else ("embedding", "head")

    def __init__(self, spec: Decoder, rngs: nnx.Rngs):
        self.spec = spec
        inherited = Inherited(
            width=spec.width,
            depth=spec.depth,
            rope=spec.rope,
            compute=spec.compute,
            rules=spec.rules,
            communication=spec.communication,
            channel_chunk=spec.channel_chunk,
            gradient_sum=spec.gradient_sum,
            documents=spec.documents,
            beacons=spec.memory if isinstance(spec.memory, ActivationBeacon) else None,
            hides=None if spec.memory is None else spec.memory.hides,
            lora=spec.lora,
        )
        outside = dataclasses.replace(inherited, beacons=None, hides=None, lora=None)  # of the layers
        self.rope = _learned_rope(spec, rngs)
        self.embedding = weight(rngs, (spec.vocab, spec.width), ("vocab", "width"), fan_in=spec.width)
        self.position_table = spec.position_table.build(spec.width, rngs=rngs) if spec.position_table else None
        self.embed_mixer = spec.embed_mixer.build(outside, rngs=rngs) if spec.embed_mixer else None
        self.slots = nnx.List([_stack(layer, inherited, spec.periods, rngs) for layer in spec.pattern])
        self.final_norm = spec.final_norm.build(spec.width)
        self.blocks = None  # of `in_blocks`
        untied = spec.head == "untied"
        self.head = weight(rngs, (spec.width, spec.vocab), ("width", "vocab"), fan_in=spec.width) if untied else None

    def __call__(self, batch: Batch, state: Any = None, *, upto: int | None = None) -> tuple[Float[Array, "B T M"], Any, Aux]:
        """Hidden states after the final norm, ready for `logits`; with `upto`, the raw stream after that many layers.

        Raises ValueError if `upto` is not a multiple of the pattern's length between 0 and the depth, or if `state` is given
        with it (a state holds every layer).
        """
        x, state, aux = self._stream(self._with_lengths(batch, state), state, self._periods(upto, state))
        return (self.final_norm(x) if upto is None else x), state, aux

    def _with_lengths(self, batch: Batch, state: Any) -> Batch:
        """With the lengths of documents where something reads them: once for all layers."""
        batch = jax.tree.map(jnp.asarray, batch)
        if state is not None or length_policy(self.spec) is None:
            return batch
        return dataclasses.replace(batch, info=dataclasses.replace(batch.info, lengths=lengths_of(batch.info)))

    def _stream(self, batch: Batch, state: Any, periods: int) -> tuple[Float[Array, "B T M"], Any, Aux]:
        """The stream after the first so many periods of layers, and their state."""
        rope = None if self.rope is None else self.rope()
        x, embed_state = self._entered(batch, state and state["embed"], Place(frequencies=rope))
        slots = tuple(self.slots) if periods == self.spec.periods else jax.tree.map(lambda p: p[:periods], tuple(self.slots))

        def period(x, stacked, number: int | None = None, above: tuple = ()):
            blocks, states, first = stacked
            given = states if states is not None else (None,) * len(blocks)
            new, aux = [], []
            x = checkpoint_name(x, STREAM)
            for slot, (block, block_state) in enumerate(zip(blocks, given, strict=True)):
                place = Place(layer=first + slot, frequencies=rope)
                if number is not None:
                    place = dataclasses.replace(place, number=number + slot, above=(*above, *new))
                x, block_state, block_aux = block(x, batch, block_state, place=place)
                new.append(block_state)
                aux.append(block_aux)
            return x, (None if states is None else tuple(new), join_aux(*aux))

        if state is not None and isinstance(state["layers"], list):
            states = []
            blocks_of = self.blocks or self._blocks()
            for n, given in enumerate(state["layers"]):
                blocks = blocks_of[n]
                first, above = n * len(slots), tuple(itertools.chain(*states))
                x, (new, aux) = period(x, (blocks, given, jnp.int32(first)), first, above)
                states.append(new)
            return x, {"embed": embed_state, "layers": states}, aux
        policy = REMAT[self.spec.remat]
        body = period if policy is None else jax.checkpoint(period, prevent_cse=False, policy=policy)

        def step(carry, stacked):
            """States are carried, and each is put back where it was: as outputs of the scan all would be held twice."""
            (x, held), (blocks, n) = carry, stacked
            given = None if held is None else of_layer(held, n)
            x, (new, aux) = body(x, (blocks, given, n * len(self.spec.pattern)))
            return (x, None if held is None else in_layers(held, new, n)), aux

        held, numbers = None if state is None else state["layers"], jnp.arange(periods, dtype=jnp.int32)
        (x, layers), aux = jax.lax.scan(step, (x, held), (slots, numbers), unroll=self._unroll(periods))
        return x, None if state is None else {"embed": embed_state, "layers": layers}, over_layers(aux)

    def logits(self, hidden: Float[Array, "*n M"]) -> Float[Array, "*n V"]:
        """Float32 logits of hidden states; give them in chunks, never for a whole long row."""
        matrix = self.embedding[...].T if self.head is None else self.head[...]
        logits = wide_product(hidden, matrix, self.spec.compute)
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_state(self, batch_size: int, length: int) -> dict[str, Any]:
        """The empty state of every mixer, for `length` tokens a row."""
        first = [jax.tree.map(lambda p: p[0], slot) for slot in self.slots]
        layers = tuple(self._slot_state(n, slot, batch_size, length) for n, slot in enumerate(first))
        if any(isinstance(slot, list) for slot in layers):  # of shapes of their own: by periods, as `apart` has them
            each = [
                slot if isinstance(slot, list) else [jax.tree.map(lambda x, n=n: x[n], slot) for n in range(self.spec.periods)]
                for slot in layers
            ]
            layers = list(zip(*each, strict=True))
        embed = None if self.embed_mixer is None else self.embed_mixer.init_state(batch_size, length)
        return {"embed": shared_rows(embed, self.spec.rules), "layers": layers}

    def _slot_state(self, n: int, slot: nnx.Module, batch_size: int, length: int) -> Any:
        """Of the layers of one slot of the pattern, stacked, or a list where they differ."""
        if not getattr(getattr(self.spec.pattern[n].mixer, "cache", None), "by_layer", False):
            stack = lambda leaf: jnp.broadcast_to(leaf, (self.spec.periods, *leaf.shape))
            return jax.tree.map(stack, slot.init_state(batch_size, length))
        layers = range(n, self.spec.depth, len(self.spec.pattern))
        states = [slot.init_state(batch_size, length, layer) for layer in layers]
        kinds = {(jax.tree.structure(state), *(x.shape for x in jax.tree.leaves(state))) for state in states}
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) if len(kinds) == 1 else states

    def in_blocks(self) -> "DecoderModel":
        """A copy that has the parameters of each period apart, for a loop around it that would cut them out again and again."""
        if self.spec.unroll != "all" or self.spec.memory is not None:
            return self
        model = nnx.merge(*nnx.split(self))
        model.blocks = nnx.data(model._blocks())
        return model

    def _blocks(self) -> list[tuple[nnx.Module, ...]]:
        return [jax.tree.map(lambda p, n=n: p[n], tuple(self.slots)) for n in range(self.spec.periods)]

    def apart(self, state: Any) -> Any:
        """A state whose layers are not stacked, where all periods are unrolled: what is written to one leaves the others where
        they lie. Auxiliary values that come with it are of the last period alone."""
        if self.spec.unroll != "all" or self.spec.memory is not None or isinstance(state["layers"], list):
            return state
        periods = [jax.tree.map(lambda leaf, n=n: leaf[n], state["layers"]) for n in range(self.spec.periods)]
        return state | {"layers": periods}

    def _entered(self, batch: Batch, state: Any, place: Place) -> tuple[Float[Array, "B T M"], Any]:
        """What the first layer reads, and the state of the embeddings' mixer."""
        x = self._embed(batch)
        if self.embed_mixer is None:
            return x, None
        y, state, _ = self.embed_mixer(x, batch, state, place=place)
        return x + y, state

    def _embed(self, batch: Batch) -> Float[Array, "B T M"]:
        spec = self.spec
        x = lookup(self.embedding[...], batch.tokens, scale=spec.embed_scale, rules=spec.rules, compute=spec.compute)
        if batch.embeds is not None:
            x = jnp.where((batch.tokens < 0)[..., None], batch.embeds.astype(x.dtype), x)
        if self.position_table is not None:
            x = x + self.position_table(batch.info).astype(x.dtype)
        return shard(x, spec.rules, "batch", "sequence", None)

    def _unroll(self, periods: int) -> int:
        """Periods a scan step when `periods` of them run."""
        asked = self.spec.unroll
        return max(periods, 1) if asked == "all" else min(asked, max(periods, 1))

    def _periods(self, upto: int | None, state: Any) -> int:
        pattern = len(self.spec.pattern)
        if upto is None:
            return self.spec.periods
        if state is not None:
            raise ValueError("decoder: upto needs state=None, since a state holds every layer")
        if upto % pattern or not 0 <= upto <= self.spec.depth:
            raise ValueError(f"decoder: upto = {upto}: expected a multiple of {pattern} from 0 to {self.spec.depth}")
        return upto // pattern


def over_layers(aux: dict[str, Float[Array, "L"]]) -> Aux:
    """Auxiliary values of all layers, of which each has one: losses are added, metrics averaged."""
    return {key: value.sum() if key.endswith("_loss") else value.mean() for key, value in aux.items()}


def _learned_rope(spec: Decoder, rngs: nnx.Rngs) -> nnx.Module | None:
    """The model's rope with its parameters, if it has any. Raises SpecError unless its readers have one head size."""
    if spec.rope is None or not spec.rope.learned:
        return None
    readers = [part for _, part in below(spec) if getattr(part, "rope", None) == "model"]
    sizes = sorted({part.head_dim for part in readers})
    spec.check(len(sizes) == 1, "rope", f"heads of one size, not {sizes}, to learn frequencies for")
    return spec.rope.build(sizes[0], rngs=rngs)


def settled(model: DecoderModel) -> DecoderModel:
    """The same model for use: a learned rope is solved once, not in every pass."""
    if not hasattr(model.rope, "settled"):
        return model
    model = nnx.merge(*nnx.split(model))
    model.rope = jax.jit(lambda rope: rope.settled())(model.rope)
    return model


def rebuild(model: DecoderModel, spec: Decoder) -> DecoderModel:
    """The parameters of `model` under an edited spec: another rope, mask, cache, compute.

    Raises SpecError if the edited model has other parameters, or a cache with tables of others.
    """
    graph, wanted = nnx.split(nnx.eval_shape(lambda: spec.build(rngs=nnx.Rngs(0))))
    held = nnx.state(model)
    shapes = lambda state: {path: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    if shapes(wanted) != shapes(held):
        differing = sorted(map(str, set(shapes(wanted).items()) ^ set(shapes(held).items())))
        raise SpecError(f"rebuild: the edited spec has other parameters, first {differing[0]}")
    model = nnx.merge(graph, held)
    check_known(spec, model)
    return model


def merged(model: DecoderModel) -> DecoderModel:
    """A decoder without LoRA that gives what this one does: the products are added to the projections."""
    lora = model.spec.lora
    if lora is None:
        return model
    held = dict(nnx.to_flat_state(nnx.state(model)))
    for path in [path for path in held if path[-1] == "down" and "lora" in path]:
        *at, _, name, _ = path
        pair = [held.pop((*path[:-1], part))[...] for part in ("down", "up")]
        product = jax.vmap(lambda down, up: jnp.tensordot(down, up, axes=1, precision="highest"))(*pair)
        base = held[(*at, name)]
        held[(*at, name)] = base.replace((base[...] + lora.scale / lora.rank * product).astype(base.dtype))
    spec = dataclasses.replace(model.spec, lora=None)
    graph, _ = nnx.split(nnx.eval_shape(lambda: spec.build(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.from_flat_state(held))


def _stack(layer: Layer, inherited: Inherited, periods: int, rngs: nnx.Rngs):
    """One slot of the pattern with its parameters stacked [periods, ...]."""

    @nnx.split_rngs(splits=periods)
    @nnx.vmap(axis_size=periods, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def build(rngs: nnx.Rngs):
        return layer.build(inherited, rngs=rngs)

    return build(rngs)
