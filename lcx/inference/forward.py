"""One forward pass over padded rows: log-probabilities of their own tokens, and embeddings."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import PADDING, Batch, causal_info
from lcx.models.decoder import DecoderModel

HEAD_TOKENS = 1024  # tokens whose logits exist at once


@jax.jit
def token_logprobs(
    model: DecoderModel,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    positions: Float[Array, "B T P"] | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-probability of the token after each place, and whether it is the likeliest (ties: the lowest id).

    The last place means nothing. positions: None is the index. Logits exist for `HEAD_TOKENS` tokens at once.
    """
    info = causal_info(segments)
    if positions is not None:
        info = dataclasses.replace(info, positions=positions)
    hidden, _, _ = model(Batch(tokens=tokens, info=info))
    return logprobs_of(model, hidden, jnp.roll(tokens, -1, axis=1))


def logprobs_of(
    model: DecoderModel, hidden: Float[Array, "B T M"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-probability of each target behind a hidden state, and whether it is the likeliest."""
    rows, length = targets.shape
    chunk = min(length, max(1, HEAD_TOKENS // rows))
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    def head(part):
        hidden, targets = part
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length]
    return jax.tree.map(join, jax.lax.map(head, (cut(hidden), cut(targets))))


@jax.jit
def embeddings(model: DecoderModel, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B M"]:
    """The mean of each row's last hidden states, in float32, scaled to length 1."""
    hidden, _, _ = model(Batch(tokens=tokens, info=causal_info(segments)))
    total = jnp.where((segments != PADDING)[..., None], hidden.astype(jnp.float32), 0).sum(axis=1)
    return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)
