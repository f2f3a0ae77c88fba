"""Softmax attention as a token mixer: grouped queries, any mask, rope and cache, optional qk-norm, biases, soft-cap, sinks."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcx.attention.attend import KERNELS, Backend
from lcx.attention.chunk_summaries import sum_up
from lcx.attention.mask import Causal, Mask, tokens_of
from lcx.attention.merge import with_sinks
from lcx.attention.persistent import with_persistent
from lcx.attention.sharded import sharded_attend
from lcx.attention.split_keys import split_axes
from lcx.batch import PADDING, Batch, TokenInfo, lengths_of
from lcx.cache.cache import At, Cache
from lcx.cache.dense import DenseCache
from lcx.cache.scorers.scorer import Asked, Rule
from lcx.linear import linear
from lcx.lora import OF_ATTENTION, lora_pairs
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place, residual_gain, weight
from lcx.norms import RMSNorm
from lcx.parallel.gathered import axes_size
from lcx.parallel.rules import shard
from lcx.positions.distance_plan import DistancePlan, Distances
from lcx.positions.frequencies import Frequencies, FrequencyRule
from lcx.positions.linear_bias import LinearBias
from lcx.positions.query_scale import QueryScale
from lcx.positions.rotate import rotate

Beside = Callable[[Array, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """heads: query heads; kv_heads divides them. rope: `model` takes the model's rule, `none` is NoPE, a rule is its own.

    bias: which projections have one. scale: of the logits, default 1 / sqrt(head_dim). qk_norm: over the channels of a head,
    before the rotation. softcap: cap * tanh(logits / cap). sinks: `learned` gives each query head a logit that stands in every
    softmax and brings no value (gpt-oss, 2025), so that a head can look at nothing; it begins at 0, as that of a key of zeros.
    distances: turns pairs by regions of their distance instead, with the rope's frequencies. query_scale: a factor on queries
    that grows with their place. distance_bias: scores that fall with distance. persistent: learned keys and values a key head
    that all queries see, whatever the mask.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mask: Mask = Causal()
    rope: FrequencyRule | Literal["model", "none"] = "model"
    qk_norm: RMSNorm | None = None
    bias: Literal["none", "qkv", "all"] = "none"
    scale: float | None = None
    softcap: float | None = None
    sinks: Literal["none", "learned"] = "none"
    distances: DistancePlan | None = None
    query_scale: QueryScale | None = None
    distance_bias: LinearBias | None = None
    persistent: int = 0
    cache: Cache = DenseCache()
    backend: Backend = "auto"

    def validate(self):
        for field in ("heads", "kv_heads", "head_dim"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(self.heads % self.kv_heads == 0, "heads", f"a multiple of kv_heads = {self.kv_heads}")
        self.check(self.persistent >= 0, "persistent", "0 or a positive number")
        self.check(self.softcap is None or self.softcap > 0, "softcap", "a positive number or None")
        self.check(self.scale is None or self.scale > 0, "scale", "a positive number or None")
        own = isinstance(self.rope, FrequencyRule) and self.rope.learned
        self.check(not own, "rope", "'model' where it is learned: one for all layers")
        self.check(self.distances is None or self.rope != "none", "distances", "None where rope is 'none': nothing turns")
        undefined = self.softcap is not None or self.distances is not None
        expected = "None beside a softcap or a distance plan: no method combines them"
        self.check(self.distance_bias is None or not undefined, "distance_bias", expected)
        if self.distances is not None and self.distances.reads_queries:
            self.check(
                self.query_scale is None, "query_scale", f"None beside {self.distances}, which sums up queries of any place"
            )
            alone = "None beside another mask than Causal(), of which it chooses a part"
            self.check(self.mask == Causal(), "distances", alone)
            self.check(
                self.backend not in KERNELS, "distances", "None beside backends 'tpu' and 'gpu', which have no kernel for it"
            )

    @property
    def softmax_scale(self) -> float:
        """The scale of the logits that is in force."""
        return self.scale or 1 / math.sqrt(self.head_dim)

    def build(self, inherited, *, rngs):
        from lcx.mixers.beacon_attention import BeaconAttentionModule

        kind = AttentionModule if inherited.beacons is None else BeaconAttentionModule
        return kind(self, inherited, rngs)

    @classmethod
    def examples(cls):
        from lcx.attention.mask import Sink, Window
        from lcx.positions.alibi import ALiBi
        from lcx.positions.long_heads import LongHeads
        from lcx.positions.query_scale import LogN
        from lcx.positions.self_extend import SelfExtend

        return (
            cls(heads=4, kv_heads=2, head_dim=8),
            cls(heads=2, kv_heads=2, head_dim=8, bias="all", qk_norm=RMSNorm(), softcap=5.0, cache=DenseCache(keys="raw")),
            cls(heads=2, kv_heads=1, head_dim=8, rope="none", mask=Sink(size=1) | Window(size=5), bias="qkv"),
            cls(heads=4, kv_heads=2, head_dim=8, mask=Window(size=6), sinks="learned", persistent=3),
            cls(heads=2, kv_heads=1, head_dim=8, distances=SelfExtend(group=2, window=4), query_scale=LogN(original_length=6)),
            cls(heads=6, kv_heads=2, head_dim=8, rope="none", distance_bias=ALiBi(), sinks="learned"),
            cls(heads=4, kv_heads=2, head_dim=8, distances=LongHeads(chunk=2, chunks=4)),
        )


class AttentionModule(MixerModule):
    CAST = OF_ATTENTION

    def __init__(self, spec: Attention, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        self.mask = spec.mask if inherited.hides is None else spec.mask & inherited.hides
        spec.check(
            spec.distances is None or self._rope is not None, "distances", "None where the model has no rope: nothing turns"
        )
        if spec.distances is not None and spec.distances.chooses:
            whole = self._rope.pairing == "half" and self._rope.rotary == 1
            spec.check(whole, "distances", "no choice of dimensions beside a rope of part of a head or of interleaved pairs")
        if spec.distances is not None:
            spec.distances.check_model(inherited.depth, spec.heads, self._rope.rotated(spec.head_dim) // 2)
        M, H, K, D = inherited.width, spec.heads, spec.kv_heads, spec.head_dim
        self.query = weight(rngs, (M, H, D), ("width", "heads", None), fan_in=M)
        self.key = weight(rngs, (M, K, D), ("width", "kv_heads", None), fan_in=M)
        self.value = weight(rngs, (M, K, D), ("width", "kv_heads", None), fan_in=M, gain=inherited.gain)
        self.output = weight(rngs, (H, D, M), ("heads", None, "width"), fan_in=H * D, gain=residual_gain(inherited))
        projections = {name: getattr(self, name) for name in OF_ATTENTION}
        self.lora = lora_pairs(inherited.lora, projections, inherited.rules, rngs)
        zeros = lambda shape, axes: nnx.Param(jnp.zeros(shape), axes=axes)
        self.query_bias = zeros((H, D), ("heads", None)) if spec.bias != "none" else None
        self.key_bias = zeros((K, D), ("kv_heads", None)) if spec.bias != "none" else None
        self.value_bias = zeros((K, D), ("kv_heads", None)) if spec.bias != "none" else None
        self.output_bias = zeros((M,), ("width",)) if spec.bias == "all" else None
        self.sinks = zeros((H,), ("heads",)) if spec.sinks == "learned" else None
        if spec.persistent:
            held = lambda: weight(rngs, (K, spec.persistent, D), ("kv_heads", None, None), fan_in=D)
            self.persistent_keys, self.persistent_values = held(), held()
        self.query_norm = spec.qk_norm.build(D) if spec.qk_norm else None
        self.key_norm = spec.qk_norm.build(D) if spec.qk_norm else None

    def frequencies(self, length: int) -> Frequencies | None:
        """The frequencies in force for rows of `length` tokens; None without rotation."""
        rule = self._rope
        return rule.frequencies(self.spec.head_dim, length) if isinstance(rule, FrequencyRule) else None

    @property
    def _rope(self):
        return self.inherited.rope if self.spec.rope == "model" else self.spec.rope

    def __call__(
        self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place(), beside: Beside | None = None
    ):
        """beside: of what heads found and their queries, keys and values before any rotation: what they give instead."""
        spec, rules, info = self.spec, self.inherited.rules, batch.info
        q, (k, v) = self._queries(x), self._keys(x)
        if spec.query_scale is not None:
            lengths = lengths_of(info) if state is None and spec.query_scale.reads_lengths else info.lengths
            q = q * spec.query_scale.scale(info.index, place.layer, lengths)[..., None, None]  # rounded after the rotation
        unturned = q, k, v
        length = x.shape[1] if state is None else spec.cache.length(state)
        frequencies, distances = self._frequencies_at(length, place), None
        if spec.distances is not None:
            distances, frequencies = Distances(spec.distances, self._rope, spec.head_dim, length), None
            q = spec.distances.chosen(q, place.layer) if spec.distances.chooses else q
            if spec.distances.reads_queries:
                k, v = (jnp.repeat(x, spec.heads // x.shape[2], axis=2) for x in (k, v)) if state is None else (k, v)
                k = spec.distances.held(q.astype(x.dtype), k)
        if frequencies is not None:
            lengths = info.lengths if state is not None or not frequencies.by_length else lengths_of(info)
            q = rotate(q, info.positions, frequencies, lengths)
        q = q.astype(x.dtype)
        options = {
            "mask": self.mask,
            "scale": self.spec.softmax_scale,
            "softcap": spec.softcap,
            "bias": spec.distance_bias,
            "backend": spec.backend,
            "distances": distances,
        }
        if state is None:
            if frequencies is not None:
                k = rotate(k, info.positions, frequencies, lengths, side="key").astype(x.dtype)
            mesh = {"rules": rules, "communication": self.inherited.communication}
            out, lse = sharded_attend(q, k, v, info, info, **mesh, **options)
        else:
            before, state = state, spec.cache.append(state, k, v, info, frequencies)
            if distances is not None and distances.plan.reads_queries:
                options["distances"] = dataclasses.replace(distances, summed=True)
                how = {"distances": distances, "scale": self.spec.softmax_scale, "softcap": spec.softcap}
                keys = lambda k, v, info, new: sum_up(k, v, tokens_of(info), new, **how)
                state = spec.cache.rewrite(state, before, keys)
            out, lse = spec.cache.attend(state, q, info, frequencies=frequencies, rules=rules, **options)
            state = self._pruned(state, q, unturned[0], out, lse, info, frequencies, place)
        out = self._with_learned(out, lse, unturned[0], info)
        if beside is not None:
            out = beside(out, *unturned)
        return self._output(out, x), state, {}

    def init_state(self, batch_size, length, layer: int = 0):
        """layer: of the model, where its cache has a kind of state of its own."""
        spec = self.spec
        dtype = jnp.dtype(self.inherited.compute)
        axes = max(1, len(self._rope.sections)) if isinstance(self._rope, FrequencyRule) else 1
        asking = spec.heads // spec.kv_heads if spec.distances is not None and spec.distances.reads_queries else 0
        sizes = (spec.kv_heads, (1 + asking) * spec.head_dim, spec.head_dim)
        rules = self.inherited.rules
        at = At(
            layer=layer,
            depth=self.inherited.depth,
            heads=spec.heads,
            shards=axes_size(split_axes(rules)),
            reach=self.mask.reach,
        )
        return spec.cache.placed(spec.cache.init(batch_size, length, *sizes, dtype, axes, at), rules)

    def _pruned(self, state, q, raw, out, lse, info: TokenInfo, frequencies: Frequencies | None, place: Place):
        """The cache after a pass. lse: of keys; persistent keys and sinks take their share of the attention too."""
        spec = self.spec
        _, lse = self._with_persistent(out, lse, raw, info)
        lse = lse if self.sinks is None else jnp.where(lse == -jnp.inf, lse, jnp.logaddexp(lse, self.sinks[...]))
        output = self.output[...].astype(self.inherited.compute)
        asked = Asked(q=q, raw=raw, out=out, lse=lse, info=info.filled(), output=output)
        rule = Rule(mask=self.mask, scale=spec.softmax_scale, softcap=spec.softcap, bias=spec.distance_bias)
        leads = None if place.number is None else spec.cache.leads(place.number)
        leader = None if leads is None else place.above[leads]
        placed = {"leader": leader, "rules": self.inherited.rules}
        return spec.cache.prune(state, asked, frequencies=frequencies, rule=rule, **placed)

    def _frequencies_at(self, length: int, place: Place) -> Frequencies | None:
        """Those in force, the model's where its rope is learned."""
        frequencies = self.frequencies(length)
        if frequencies is None or not self._rope.learned:
            return frequencies
        if place.frequencies is None:
            raise ValueError("attention: its model's rope is learned: expected its frequencies in `place`")
        return place.frequencies

    def _queries(self, x):
        return self._project(x, "query", self.query_norm, "heads")

    def _keys(self, x):
        """Keys, and values."""
        k = self._project(x, "key", self.key_norm, "kv_heads")
        return k, self._project(x, "value", None, "kv_heads")

    def _project(self, x, name: str, norm, heads: str):
        matrix, bias = getattr(self, name), getattr(self, f"{name}_bias")
        y = linear(x, matrix, self.inherited.rules, gradient_sum=self.inherited.gradient_sum)
        if self.lora is not None and name in self.lora:
            y = y + self.lora[name](x)
        if bias is not None:
            y = y + bias[...].astype(x.dtype)
        if norm is not None:
            y = norm(y)
        return shard(y, self.inherited.rules, "batch", "sequence", heads, None)

    def _with_learned(self, out, lse, q, info: TokenInfo):
        """What heads find beside persistent keys and sinks; q: before any rotation."""
        out, lse = self._with_persistent(out, lse, q, info)
        return out if self.sinks is None else with_sinks(out, lse, self.sinks[...])

    def _with_persistent(self, out, lse, q, info: TokenInfo):
        if not self.spec.persistent:
            return out, lse
        held = info.segments != PADDING, self.persistent_keys[...], self.persistent_values[...]
        return with_persistent(out, lse, q, *held, scale=self.spec.softmax_scale, softcap=self.spec.softcap)

    def _output(self, out, x):
        gradient_sum = self.inherited.gradient_sum
        y = linear(out.astype(x.dtype), self.output, self.inherited.rules, contracted=2, gradient_sum=gradient_sum)
        if self.lora is not None and "output" in self.lora:
            y = y + self.lora["output"](out.astype(x.dtype))
        if self.output_bias is not None:
            y = y + self.output_bias[...].astype(x.dtype)
        return shard(y, self.inherited.rules, "batch", "sequence", None)
