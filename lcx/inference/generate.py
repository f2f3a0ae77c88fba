"""Generation: prompts of any lengths prefilled in chunks, then decoded one token a step, all together."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from lcx.inference.decoding import Asked, Decoding, decode, keys_of, nothing_decoded, stop_rows
from lcx.inference.overflow import check_overflow
from lcx.inference.reading import Consumed, check_not_consumed, check_room, padded_rows, prefill
from lcx.inference.sampling import Sampling, sampling_rows
from lcx.inference.shapes import bucket
from lcx.inference.squeeze import squeezed
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
    prompts, or new ones beyond 2^24; CacheOverflow if tokens of a row found no slot in a cache.
    """
    if max_new < 1 or not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"generate: max_new = {max_new} and {len(prompts)} prompts: expected at least one token of each")
    options = _for_rows(len(prompts), sampling, seeds, until)
    model = settled(model)
    read = prefill(model, prompts, padded_rows(len(prompts), model.spec.rules), max_new, chunk, placed)
    return answer(model, squeezed(model, read), max_new=max_new, stop=stop, **options)[0]


def answer(
    model: DecoderModel,
    read: Consumed,
    *,
    max_new: int,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    seeds: Sequence[int] | None = None,
    stop: Sequence[int] = (),
    until: Sequence[Until | None] | None = None,
    made: int = 0,
) -> tuple[list[Generated], Consumed]:
    """(up to `max_new` tokens of each row that has read something, the rows after them). The old `read` is consumed.

    made: tokens that these rows were given before behind their prompts, so that an answer in parts draws as a whole one does;
    the other options are those of `generate`. Raises ValueError and CacheOverflow as it does, ValueError where a row has no
    room, and where `read` was consumed before.
    """
    check_not_consumed(read)
    model, rows = settled(model), len(read.seen)
    some = np.flatnonzero(np.asarray(read.seen))
    options = _for_rows(len(some), sampling, seeds, until)
    room = int(np.asarray(read.most - read.seen)[some].min(initial=max_new))
    if not 1 <= max_new <= room:
        raise ValueError(f"generate: max_new = {max_new}: expected 1 to the {room} tokens that rows have room for")
    check_room(model.spec, [n - made for n in np.asarray(read.seen)[some].tolist()], made + max_new)
    spread = lambda values, blank: [dict(zip(some.tolist(), values, strict=True)).get(n, blank) for n in range(rows)]
    until = spread(options["until"], None)
    asked = Asked(
        key=keys_of(spread(options["seeds"], 0)),
        sampling=sampling_rows(spread(options["sampling"], Sampling())),
        stops=jnp.asarray(stop_rows([tuple(stop)] * rows)),
        made=jnp.full(rows, made, jnp.int32),
        limit=jnp.full(rows, made + max_new, jnp.int32),
    )
    decoding = nothing_decoded(read, bucket(max_new), read.seen == 0)
    ask = max_new if not any(until) else ASK_EVERY
    for end in (*range(ask, max_new, ask), max_new):
        decoding = decode(model, decoding, asked, jnp.int32(end))
        if end < max_new:
            ended = [u is not None and u(row.ids) for u, row in zip(until, _rows(decoding, max_new), strict=True)]
            stopped = np.asarray(decoding.stopped) | ended
            if stopped.all():
                break
            decoding = dataclasses.replace(decoding, stopped=jnp.asarray(stopped))
    seen = np.asarray(decoding.read.seen) > 0
    check_overflow(model, decoding.read.state, np.asarray(decoding.unplaced), seen)
    found = _rows(decoding, max_new)
    return [found[n] for n in some], decoding.read


def _for_rows(
    count: int,
    sampling: Sampling | Sequence[Sampling],
    seeds: Sequence[int] | None,
    until: Sequence[Until | None] | None,
) -> dict[str, Sequence]:
    """The options, one a row. Raises ValueError where there are more or fewer."""
    sampling = [sampling] * count if isinstance(sampling, Sampling) else sampling
    seeds, until = range(count) if seeds is None else seeds, [None] * count if until is None else until
    if not len(seeds) == len(until) == len(sampling) == count:
        counts = f"{len(seeds)} seeds, {len(until)} conditions and {len(sampling)} samplings"
        raise ValueError(f"generate: {counts} for {count} prompts")
    return {"sampling": sampling, "seeds": seeds, "until": until}


def _rows(decoding: Decoding, limit: int) -> list[Generated]:
    ids, logprobs, count, stopped = map(np.asarray, (decoding.ids, decoding.logprobs, decoding.count, decoding.stopped))
    return [
        Generated(ids[b, :n].tolist(), logprobs[b, :n].tolist(), "stop" if stopped[b] and n < limit else "length")
        for b, n in enumerate(count)
    ]
