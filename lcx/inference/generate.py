"""Generation: prompts of any lengths prefilled in chunks, then decoded one token a step under one jitted loop.

The generator owns `seen [B]`, the tokens each row has consumed, and makes each chunk's TokenInfo from it. A finished row is
fed padding, which changes nothing in any state. A row's tokens do not depend on the rows beside it.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.batch import PADDING, Batch, causal_info
from lcx.inference.sampling import Sampling
from lcx.inference.shapes import bucket, right_padded
from lcx.models.decoder import DecoderModel


class Generated(NamedTuple):
    """ids: the new tokens, the stop token left out. logprobs: of each, under the model. finish: why it ended."""

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


def generate(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    sampling: Sampling = Sampling(),
    seeds: Sequence[int] | None = None,
    stop: Sequence[int] = (),
    chunk: int = 512,
) -> list[Generated]:
    """Up to `max_new` tokens after each prompt of token ids, ended by any id of `stop`.

    seeds: one a row, default its place. chunk: tokens a prefill step. Raises ValueError on an empty prompt or max_new < 1.
    """
    if max_new < 1 or not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"generate: max_new = {max_new} and {len(prompts)} prompts: expected at least one token of each")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"generate: {len(seeds)} seeds for {len(prompts)} prompts")
    longest, new = bucket(max(map(len, prompts))), bucket(max_new)
    rows = 1 << (len(prompts) - 1).bit_length()
    tokens, segments = right_padded(prompts, longest, rows)
    state = model.init_state(rows, longest + new)
    seen = jnp.zeros(rows, jnp.int32)
    last = jnp.zeros((rows, model.spec.width), model.spec.compute)
    for start in range(0, longest, chunk):
        part = slice(start, start + chunk)
        last, state, seen = feed(model, tokens[:, part], segments[:, part], state, seen, last)
    keys = jax.vmap(jax.random.key)(jnp.asarray([*seeds, *[0] * (rows - len(prompts))], jnp.uint32))
    stops = jnp.asarray(sorted(set(stop)), jnp.int32)
    ids, logprobs, count, stopped = map(
        np.asarray, _decode(model, last, state, seen, keys, stops, jnp.int32(max_new), sampling, new)
    )
    return [
        Generated(ids[b, : count[b]].tolist(), logprobs[b, : count[b]].tolist(), "stop" if stopped[b] else "length")
        for b in range(len(prompts))
    ]


@jax.jit
def feed(
    model: DecoderModel,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: Any,
    seen: Int[Array, "B"],
    last: Float[Array, "B M"],
) -> tuple[Float[Array, "B M"], Any, Int[Array, "B"]]:
    """Feeds a chunk; returns each row's hidden state at its last token so far, the state, the tokens consumed."""
    hidden, state, _ = model(Batch(tokens=tokens, info=causal_info(segments, start=seen)), state)
    count = (segments != PADDING).sum(axis=1, dtype=jnp.int32)
    newest = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((count > 0)[:, None], newest, last), state, seen + count


@functools.partial(jax.jit, static_argnames=("sampling", "length"))
def _decode(model, last, state, seen, keys, stops, max_new, sampling: Sampling, length: int):
    """(ids [B, length], logprobs, count [B], stopped [B]): the loop ends when every row has, or after `max_new` steps."""
    rows = seen.shape[0]

    def step(carry):
        n, last, state, seen, ids, logprobs, count, stopped = carry
        logits = model.logits(last)
        token = sampling.choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, n))
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        stopped = stopped | (token[:, None] == stops).any(axis=1)
        ids, logprobs = ids.at[:, n].set(token), logprobs.at[:, n].set(logprob)
        segments = jnp.where(stopped, PADDING, 1)[:, None]
        hidden, state, _ = model(Batch(tokens=token[:, None], info=causal_info(segments, start=seen)), state)
        going = jnp.where(stopped, 0, 1)
        return n + 1, hidden[:, 0], state, seen + going, ids, logprobs, count + going, stopped

    def unfinished(carry):
        return (carry[0] < max_new) & ~carry[-1].all()

    ids, logprobs = jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, length), jnp.float32)
    start = (jnp.int32(0), last, state, seen, ids, logprobs, jnp.zeros_like(seen), seen == 0)
    _, _, _, _, ids, logprobs, count, stopped = jax.lax.while_loop(unfinished, step, start)
    return ids, logprobs, count, stopped
