"""DuoAttention (2024): of the key heads of a model, those that retrieve keep all tokens, the others the first and newest alone.

Which ones is known beforehand: a gate of each head, trained by the authors with the model itself as teacher. Of all heads of
all layers the `streaming` share with the lowest gates stream. A layer whose heads all stream has slots for what they keep.
Where one retrieves all heads have slots for all tokens, so that what a streaming head drops is not seen but saves no bytes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from lcx.cache.known import Measured, arrays_of
from lcx.cache.policies.budgets import Even, LayerBudgets
from lcx.cache.policies.policy import Kept, Policy
from lcx.cache.policies.top import top
from lcx.spec import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuoAttention(Measured, Policy):
    """gates: of each layer and key head: numbers, a shipped model's name, or a file: .npz with `gates` [L, K], .json rows of
    numbers, or .tsv as the authors'. streaming: the share of heads that stream. sinks: first tokens of a document.
    keep: all, of a head that retrieves. every: slots of a streaming head beyond its tokens before it drops some in decoding."""

    MEASURED = ("gates", "duo_attention.npz")
    ARRAYS = "gates"

    gates: tuple[tuple[float, ...], ...] | str
    streaming: float = 0.5
    sinks: int = 64
    recent: int = 256
    keep: int | float = 1.0
    scope: Literal["prefill", "decode", "both"] = "both"
    layers: LayerBudgets = Even()

    def validate(self):
        super().validate()
        self.check(0 <= self.streaming <= 1, "streaming", "a share of heads, from 0 to 1")
        self.check(self.sinks >= 0, "sinks", "0 or more tokens")
        self.check(self.recent >= 1, "recent", "at least 1 token")
        self.check(type(self.keep) is float and self.keep == 1, "keep", "1.0: a head that retrieves keeps all")
        self.check(self.scope == "both", "scope", "'both': streaming heads always stream")
        self.check(self.layers == Even(), "layers", "Even(), as gates say which heads keep less")
        even = isinstance(self.gates, str) or (len({*map(len, self.gates)}) == 1 and len(self.gates[0]) >= 1)
        self.check(even, "gates", "one number a key head, as many in each layer")

    @property
    def by_head(self):
        return True

    @property
    def by_layer(self):
        return True

    def streams(self) -> Bool[np.ndarray, "L K"]:
        """Whether each key head of each layer streams."""
        gates, path = self.gates, Path(str(self.gates))
        try:
            if path.suffix == ".json" and path.is_file():
                gates = json.loads(path.read_text())
            elif path.suffix == ".tsv" and path.is_file():
                gates = np.loadtxt(path, delimiter="\t", ndmin=2)
            elif isinstance(gates, str):
                gates = arrays_of(self)["gates"]
            gates = np.asarray(gates, np.float64)
        except SpecError:
            raise
        except (OSError, TypeError, ValueError) as error:
            self.fail("gates", self.gates, f"rows of numbers, layers by key heads: {error}")
        if gates.ndim != 2 or not np.isfinite(gates).all():
            self.fail("gates", self.gates, f"numbers of layers and key heads, finite ones, not of shape {gates.shape}")
        lowest = np.argsort(np.clip(gates, 0, 1), axis=None, kind="stable")[: round(gates.size * self.streaming)]
        return np.isin(np.arange(gates.size), lowest).reshape(gates.shape)

    def tables(self, layer, kv_heads, head_dim):
        streams = self.streams()
        if layer >= len(streams) or streams.shape[1] != kv_heads:
            self.fail("gates", self.gates, f"{kv_heads} heads of layer {layer} of this model, not {streams.shape}")
        return streams[layer]

    def share(self, layer, depth):
        streams = self.streams()
        if len(streams) != depth:
            self.fail("gates", self.gates, f"one row for each of the model's {depth} layers, not {len(streams)}")
        return 0.0 if streams[layer].all() else 1.0

    def most(self, length, share):
        return length if share else min(self.sinks + self.recent, length)

    def slots(self, length, share):
        return length if share else min(length, self.most(length, share) + self.every)

    def budget(self, seen, share):
        return seen if share else jnp.full_like(seen, self.sinks + self.recent)

    def full(self, used, seen, share, known):
        return (known & (used > self.sinks + self.recent + self.every)).any(axis=1)

    def compress(self, now, slots):
        place = jnp.arange(now.k.shape[2])
        newest, sink = place >= now.count[..., None] - self.recent, now.info.index < self.sinks
        streamed = jnp.where(newest, jnp.inf, jnp.where(sink, place, -jnp.inf))  # of sinks those of the newest document first
        worth = jnp.where(now.there, jnp.where(now.known[..., None], streamed, 1.0), -jnp.inf)
        index, there = top(worth, jnp.where(now.known, min(self.sinks + self.recent, slots), slots), slots)
        return Kept(index=index, there=there)

    @classmethod
    def examples(cls):
        return (
            cls(gates=((0.1, 0.9),), sinks=1, recent=6, every=2),
            cls(gates=((0.2, 0.1),), streaming=1.0, sinks=2, recent=4),
        )
