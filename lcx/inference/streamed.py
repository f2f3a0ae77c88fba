"""Log-probabilities as a server would find them: prompts read in chunks into the state, what is scored behind them.

A parallel pass never meets a cache. Where the cache drops or rounds, what a model knows of a text depends on how it was read,
so the passes are part of the measurement.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcx.cache.cache import Cache
from lcx.inference.forward import logprobs_of
from lcx.inference.overflow import check_overflow, unplaced
from lcx.inference.reading import Consumed, passed, prefill
from lcx.inference.shapes import bucket, right_padded
from lcx.inference.squeeze import squeezed
from lcx.models.decoder import Decoder, DecoderModel
from lcx.spec import below


def exact(spec: Decoder) -> bool:
    """Whether every cache of a model holds all that a parallel pass sees."""
    return all(part.exact for _, part in below(spec) if isinstance(part, Cache))


def by_token(spec: Decoder) -> bool:
    """Whether some cache of a model answers a token alone otherwise than several at once."""
    return any(part.by_token for _, part in below(spec) if isinstance(part, Cache))


def streamed_logprobs(
    model: DecoderModel, rows: Sequence[Sequence[int]], starts: Sequence[int], *, size: int, chunk: int, step: int
) -> tuple[Float[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
    """Of the tokens from each row's start on: log-probability, and whether it was the likeliest; padded on the right.

    size: rows of the batch. chunk, step: tokens of a pass ahead of the start, and from there on. Raises CacheOverflow if tokens
    of a row found no slot in a cache.
    """
    prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
    rest = [row[start:] for row, start in zip(rows, starts, strict=True)]
    length = -(-bucket(max(map(len, rest))) // step) * step
    read = squeezed(model, prefill(model, prompts, size, length, chunk))
    tokens, segments = right_padded(rest, length, size, model.spec.vocab)
    found = [_first(model, read.last, tokens[:, :1])]
    targets = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    for at in range(0, length, step):
        part = slice(at, at + step)
        read, *new = _scored(model, tokens[:, part], targets[:, part], segments[:, part], read)
        found.append(new)
    logprobs, greedy = (np.concatenate([np.asarray(part[n]) for part in found], axis=1) for n in range(2))
    check_overflow(model, read.state, np.asarray(unplaced(read.state, size)), np.asarray(read.seen) > 0)
    return logprobs[: len(rows), :-1], greedy[: len(rows), :-1]


@jax.jit
def _first(model: DecoderModel, last: Float[Array, "B M"], target: Int[Array, "B 1"]):
    return logprobs_of(model, last[:, None], target)


@functools.partial(jax.jit, donate_argnames="read")
def _scored(
    model: DecoderModel, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], segments: Int[Array, "B T"], read: Consumed
) -> tuple[Consumed, Float[Array, "B T"], Bool[Array, "B T"]]:
    hidden, read = passed(model, tokens, segments, read)
    return read, *logprobs_of(model, hidden, jnp.asarray(targets))
