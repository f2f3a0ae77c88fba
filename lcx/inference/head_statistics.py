"""What queries and keys of a model's heads are like, for caches that know beforehand: directions of Q-Filters, gates of heads.

Texts are read once. The direction of a head is the first right singular vector of its rotated queries (`QFilters`). Its gate,
for DuoAttention without training (kvpress, 2025, who call it experimental), is how early its attention falls:

    p = softmax over j < span of scale R_(span-1) mean q . R_j mean k
    gate = mean over j, and heads of the group, of sum over i <= j of p_i

with means over a text before rotation, and then over texts: near 1 where attention lies on the first tokens, 1/2 if it is even.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.cache.cache import At
from lcx.cache.dense import DenseCache, DenseState
from lcx.cache.known import MODEL
from lcx.cache.scorers.q_filters import direction
from lcx.inference.calibration import Around, frequencies_of, in_parts, whole_texts
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder, DecoderModel, rebuild
from lcx.models.words import words
from lcx.positions.frequencies import Frequencies
from lcx.positions.rotate import rotate
from lcx.record import record
from lcx.spec import SpecError, edit, edits


@record
class Watched:
    """square, total: sums of q q^T and q of rotated queries. raw: their sum before."""

    held: DenseState
    square: Float[Array, "B H D D"]
    total: Float[Array, "B H D"]
    raw: Float[Array, "B H D"]


class _Watch(Around, DenseCache):
    """A dense cache of raw keys that sums up its queries."""

    def init(self, batch_size, length, kv_heads, head_dim, value_dim, dtype, axes=1, at=At()):
        held = super().init(batch_size, length, kv_heads, head_dim, value_dim, dtype, axes, at)
        zeros = lambda *shape: jnp.zeros((batch_size, at.heads, *shape))
        return Watched(held=held, square=zeros(head_dim, head_dim), total=zeros(head_dim), raw=zeros(head_dim))

    def attend(self, state, *query, **options):
        return super().attend(state.held, *query, **options)

    def prune(self, state, asked, **_):
        q = asked.q.astype(jnp.float32)
        return dataclasses.replace(
            state,
            square=state.square + jnp.einsum("bthd,bthe->bhde", q, q, precision="highest"),
            total=state.total + q.sum(axis=1),
            raw=state.raw + asked.raw.astype(jnp.float32).sum(axis=1),
        )


def watched_spec(spec: Decoder) -> Decoder:
    """The spec with caches that watch. Raises SpecError for another mixer than plain attention, or heads of several sizes."""
    for n, layer in enumerate(spec.pattern):
        if type(layer.mixer) is not Attention or layer.mixer.distances is not None or spec.memory is not None:
            raise SpecError(f"model.pattern[{n}].mixer: expected plain attention, without a distance plan or model.memory")
        sizes = [(x.mixer.kv_heads, x.mixer.head_dim) for x in (layer, spec.pattern[0])]
        if sizes[0] != sizes[1]:
            raise SpecError(f"model.pattern[{n}].mixer: expected the key heads of model.pattern[0], {sizes[1]}, not {sizes[0]}")
        spec = edit(spec, f"pattern[{n}].mixer.cache", _Watch(keys="raw"))
    return edits(spec, [("compute", "float32"), ("rules.slots", ())])  # texts are read whole


def statistics(
    model: DecoderModel, rows: Sequence[Sequence[int]], *, span: int = 500, at_once: int = 2
) -> dict[str, np.ndarray]:
    """directions [L, K, D], gates [L, K], and `model`, what tells whose they are. rows: texts of one length, in ids, read
    `at_once` or as many as the ambient mesh shares out. span: places that a gate looks back over."""
    watching = rebuild(model, watched_spec(model.spec))
    seen = in_parts(_read, watching, rows, at_once)
    made: dict[str, list[np.ndarray]] = {"directions": [], "gates": []}
    for layer in range(model.spec.depth):
        period, slot = divmod(layer, len(model.spec.pattern))
        square, total, q, k = (np.concatenate([np.asarray(part[slot][n][period]) for part in seen]) for n in range(4))
        made["directions"].append(direction(square.sum(axis=0), total.sum(axis=0), k.shape[1]))
        mixer, means = model.spec.pattern[slot].mixer, (q / len(rows[0]), k / len(rows[0]))
        made["gates"].append(gates(*means, frequencies_of(model, mixer, span), scale=mixer.softmax_scale, span=span))
    return {name: np.stack(layers).astype(np.float32) for name, layers in made.items()} | {MODEL: np.uint32(words(model))}


@jax.jit
def _read(model: DecoderModel, tokens: Int[Array, "B T"]) -> tuple[Any, ...]:
    """(square, total, raw, sum of raw keys) [periods, B, ...] of every slot of the pattern."""
    state = model.init_state(*tokens.shape)
    _, after, _ = model(whole_texts(tokens), state)
    return tuple((x.square, x.total, x.raw, x.held.k.sum(axis=2)) for x in after["layers"])


def gates(
    q: Float[np.ndarray, "N H D"], k: Float[np.ndarray, "N K D"], frequencies: Frequencies | None, *, scale: float, span: int
) -> Float[np.ndarray, "K"]:
    """Gates [K] of one layer, from mean queries and keys of each text before rotation."""
    (N, K), places = k.shape[:2], jnp.arange(span, dtype=jnp.float32)[None, :, None]
    q, k = (jnp.broadcast_to(jnp.asarray(x)[:, None], (N, span, *x.shape[1:])) for x in (q, k))
    if frequencies is not None:
        lengths = jnp.full((N, span), span, jnp.int32) if frequencies.by_length else None
        places = jnp.broadcast_to(places, (N, span, 1))
        q, k = (rotate(x, places, frequencies, lengths, side=side) for x, side in ((q, "query"), (k, "key")))
    logits = jnp.einsum("nkgd,nskd->nkgs", q[:, -1].reshape(N, K, -1, q.shape[3]), k, precision="highest")
    attention = jax.nn.softmax(logits * scale, axis=-1)
    return np.asarray(jnp.cumsum(attention, axis=-1).mean(axis=(0, 2, 3)))
