"""Generation: prompts of any lengths prefilled in chunks, then decoded one token a step, all together."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from lcx.inference.decoding import Asked, Decoding, decode, keys_of, nothing_decoded, stop_rows
from lcx.inference.reading import padded_rows, prefill
from lcx.inference.sampling import Sampling, sampling_rows
from lcx.inference.shapes import bucket
from lcx.models.decoder import DecoderModel, settled
from lcx.positions.visual import Placed

ASK_EVERY = 32  # tokens decoded before `until` is asked again

Until = Callable[[Sequence[int]], bool]


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
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    seeds: Sequence[int] | None = None,
    stop: Sequence[int] = (),
    until: Sequence[Until | None] | None = None,
    chunk: int = 512,
    placed: Sequence[Placed] | None = None,
) -> list[Generated]:
    """Up to `max_new` tokens after each prompt of token ids, ended by any id of `stop`.

    sampling: of all rows, or one a row. seeds: one a row, default its place. until: one a row; asked now and then with the
    row's new ids, True ends the row, which may by then be longer than the asker needs. chunk: tokens a prefill step. placed:
    the positions of each prompt, from a rule for visual documents; new tokens go on behind them. Raises ValueError on an
    empty prompt, an id that the model does not have, a seed outside 32 bits, max_new < 1, positions that are not those of the
    prompts, or new ones beyond 2^24.
    """
    if max_new < 1 or not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"generate: max_new = {max_new} and {len(prompts)} prompts: expected at least one token of each")
    seeds = range(len(prompts)) if seeds is None else seeds
    until = [None] * len(prompts) if until is None else until
    several = len(prompts) if isinstance(sampling, Sampling) else len(sampling)
    if not len(seeds) == len(until) == several == len(prompts):
        counts = f"{len(seeds)} seeds, {len(until)} conditions and {several} samplings"
        raise ValueError(f"generate: {counts} for {len(prompts)} prompts")
    rows, new = padded_rows(len(prompts), model.spec.rules), bucket(max_new)
    model = settled(model)
    read = prefill(model, prompts, rows, max_new, chunk, placed)
    empty = rows - len(prompts)
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    asked = Asked(
        key=keys_of([*seeds, *[0] * empty]),
        sampling=sampling_rows([*each, *[Sampling()] * empty]),
        stops=jnp.asarray(stop_rows([tuple(stop)] * rows)),
        made=jnp.zeros(rows, jnp.int32),
        limit=jnp.full(rows, max_new, jnp.int32),
    )
    decoding = nothing_decoded(read, new, jnp.arange(rows) >= len(prompts))
    ask = max_new if not any(until) else ASK_EVERY
    for end in (*range(ask, max_new, ask), max_new):
        decoding = decode(model, decoding, asked, jnp.int32(end))
        if end < max_new:
            made = _rows(decoding, max_new)
            ended = [u is not None and u(row.ids) for u, row in zip(until, made, strict=False)]
            stopped = np.asarray(decoding.stopped) | np.pad(ended, (0, rows - len(ended)))
            if stopped.all():
                break
            decoding = dataclasses.replace(decoding, stopped=jnp.asarray(stopped))
    return _rows(decoding, max_new)[: len(prompts)]


def _rows(decoding: Decoding, limit: int) -> list[Generated]:
    ids, logprobs, count, stopped = map(np.asarray, (decoding.ids, decoding.logprobs, decoding.count, decoding.stopped))
    return [
        Generated(ids[b, :n].tolist(), logprobs[b, :n].tolist(), "stop" if stopped[b] and n < limit else "length")
        for b, n in enumerate(count)
    ]
