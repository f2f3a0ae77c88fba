"""Generation without end: requests come and go, rows that are finished take the next one, and nothing is compiled anew.

`rows` rows of one state decode together, `burst` tokens at a time. A request that waits is read alone, one chunk between two
bursts, and then takes a row that is free; it waits too while rows that draw on one memory leave it no room. Each row has its
own sampling, seed, stops and limit: its tokens are those of `generate`, whatever stands beside it.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lcx.cache.cache import Cache
from lcx.inference.decoding import Asked, checked_seed, decode, keys_of, nothing_decoded, stop_rows
from lcx.inference.overflow import CacheOverflow, overflow_of
from lcx.inference.reading import Consumed, check_room, feed, nothing_read, padded_rows
from lcx.inference.requests import WindowOverflow
from lcx.inference.rereading import read_again, settled_slots
from lcx.inference.sampling import Sampling, sampling_rows
from lcx.inference.seating import released, rows_axes, seated
from lcx.inference.shapes import bucket, right_padded
from lcx.models.decoder import DecoderModel, settled
from lcx.spec import below


@dataclasses.dataclass(frozen=True)
class Ask:
    """Up to `max_new` tokens behind a prompt of ids, ended by any of `stop`. top: how many of the likeliest tokens to tell of
    beside each."""

    prompt: Sequence[int]
    max_new: int
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: Sequence[int] = ()
    top: int = 0


class Piece(NamedTuple):
    """New tokens of a request. tops: of each, the likeliest (id, log-probability) first. finish: why it ended, None while it
    goes on; "overflow": tokens found no slot in a cache, as `failure` says, and what was made of the request since its last
    piece is no answer."""

    number: int
    ids: list[int]
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]
    finish: Literal["stop", "length", "overflow"] | None
    failure: CacheOverflow | None = None


class Engine:
    """Answers requests with one model. window: the most tokens of a prompt and its answer. chunk: of a prompt, read at a time.
    mesh: over which rows and heads are shared out as the model's rules say; None is one device."""

    def __init__(
        self,
        model: DecoderModel,
        *,
        window: int,
        rows: int = 8,
        chunk: int = 512,
        burst: int = 8,
        mesh: Mesh | None = None,
    ):
        for name, value in (("window", window), ("rows", rows), ("chunk", chunk), ("burst", burst)):
            if value < 1:
                raise ValueError(f"engine: {name} = {value}: expected at least 1")
        self.model, self.window, self.chunk, self.burst, self.mesh = settled(model), window, chunk, burst, mesh
        rules = model.spec.rules
        with self._on_mesh():
            self.rows, self.read_rows = padded_rows(rows, rules), padded_rows(1, rules)
        self.room = bucket(window)
        self._waiting: collections.deque[tuple[int, Ask]] = collections.deque()
        self._numbers = itertools.count()
        self._held: list[_Row | None] = [None] * self.rows
        self._reading: _Reading | None = None
        with self._on_mesh():
            self._read = settled_slots(self.model, self._empty(self.rows, [0] * self.rows))
            self._axes = rows_axes(lambda rows: self._empty(rows, [0] * rows), self.read_rows)
        self._caches = [part for _, part in below(model.spec) if isinstance(part, Cache)]

    def check(self, ask: Ask) -> None:
        """Raises WindowOverflow or ValueError for what cannot be served."""
        if len(ask.prompt) == 0 or ask.max_new < 1:
            raise ValueError(
                f"prompt of {len(ask.prompt)} tokens, max_new = {ask.max_new}: expected at least one token of each"
            )
        if len(ask.prompt) + ask.max_new > self.window:
            raise WindowOverflow(len(ask.prompt), ask.max_new, self.window)
        vocab = self.model.spec.vocab
        if outside := [n for n in ask.prompt if not 0 <= n < vocab]:
            raise ValueError(f"token id {outside[0]}: expected an id of the model's vocabulary, 0 to {vocab - 1}")
        if not 0 <= ask.top <= vocab:
            raise ValueError(f"top = {ask.top}: expected 0 to the {vocab} ids of the vocabulary")
        checked_seed(ask.seed)
        check_room(self.model.spec, [len(ask.prompt)], ask.max_new)

    def submit(self, ask: Ask) -> int:
        """The number under which its pieces come. Raises as `check`."""
        self.check(ask)
        number = next(self._numbers)
        self._waiting.append((number, ask))
        return number

    def cancel(self, number: int) -> None:
        """Forgets a request, wherever it is; none of its pieces come any more."""
        self._waiting = collections.deque(pair for pair in self._waiting if pair[0] != number)
        if self._reading is not None and self._reading.number == number:
            self._reading = None
        self._left([row is not None and row.number == number for row in self._held])

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self._reading is not None or any(self._held)

    def step(self) -> list[Piece]:
        """Reads a chunk of a waiting prompt, decodes a burst of every row, and tells what came of it."""
        with self._on_mesh():
            self._read_on()
            return self._decode_on() if any(self._held) else []

    def run(self, asks: Sequence[Ask]) -> Iterator[Piece]:
        """The pieces of all requests as they come; their numbers count from 0 in the order of `asks`. Raises the
        CacheOverflow of the first that failed, behind the last piece of the others."""
        order, failure = {self.submit(ask): n for n, ask in enumerate(asks)}, None
        while self.busy:
            for piece in self.step():
                failure = failure or piece.failure
                yield piece._replace(number=order[piece.number])
        if failure is not None:
            raise failure

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _read_on(self) -> None:
        if self._reading is None and self._waiting and None in self._held and self._fits(self._waiting[0][1]):
            number, ask = self._waiting.popleft()
            most = [len(ask.prompt) + ask.max_new] + [0] * (self.read_rows - 1)
            self._reading = _Reading(number, ask, self._empty(self.read_rows, most))
        if (now := self._reading) is None:
            return
        part = now.ask.prompt[now.done : now.done + self.chunk]
        length = self.chunk if len(part) == self.chunk else min(bucket(len(part)), self.chunk)
        tokens, segments = right_padded([list(part)], length, self.read_rows, self.model.spec.vocab)
        now.read, now.done = feed(self.model, tokens, segments, now.read), now.done + len(part)
        if now.done == len(now.ask.prompt):
            free = self._held.index(None)
            alone = read_again(self.model, now.read, [now.ask.prompt])
            self._read = seated(self._axes, self._read, alone, jnp.int32(free))
            self._held[free], self._reading = _Row(now.number, now.ask), None

    def _decode_on(self) -> list[Piece]:
        rows = [row or _IDLE for row in self._held]
        asked = Asked(
            key=keys_of([row.ask.seed for row in rows]),
            sampling=sampling_rows([row.ask.sampling for row in rows]),
            stops=jnp.asarray(stop_rows([row.ask.stop for row in rows])),
            made=jnp.asarray(np.asarray([row.made for row in rows], np.int32)),
            limit=jnp.asarray(np.asarray([row.ask.max_new for row in rows], np.int32)),
        )
        top = max(row.ask.top for row in rows)
        top = min(1 << (top - 1).bit_length(), self.model.spec.vocab) if top else 0  # few sizes, so that few are compiled
        stopped = jnp.asarray([row is None for row in self._held])
        decoding = decode(self.model, nothing_decoded(self._read, self.burst, stopped, top), asked, jnp.int32(self.burst))
        self._read = decoding.read
        found = {name: np.asarray(getattr(decoding, name)) for name in ("ids", "logprobs", "top_ids", "top_logprobs")}
        count, ended, unplaced = map(np.asarray, (decoding.count, decoding.stopped, decoding.unplaced))
        pieces, left = [], [False] * self.rows
        for b, row in enumerate(self._held):
            if row is None:
                continue
            if unplaced[b]:
                failure = overflow_of(self.model, self._read.state, b)
                pieces.append(Piece(row.number, [], [], [], "overflow", failure))
                left[b] = True
                continue
            n, row.made = count[b], row.made + int(count[b])
            finish = None if not ended[b] else "length" if row.made == row.ask.max_new else "stop"
            ids, logprobs, top_ids, top_logprobs = (found[name][b, :n].tolist() for name in found)
            tops = [list(zip(i, x, strict=True))[: row.ask.top] for i, x in zip(top_ids, top_logprobs, strict=True)]
            pieces.append(Piece(row.number, ids, logprobs, tops, finish))
            left[b] = finish is not None
        self._left(left)
        return pieces

    def _fits(self, ask: Ask) -> bool:
        """Whether caches hold a request beside those that have a row, all at their longest."""
        asks = [ask, *(row.ask for row in self._held if row is not None)]
        lengths = [len(each.prompt) + each.max_new for each in asks]
        return all(cache.fits(lengths) for cache in self._caches)

    def _empty(self, rows: int, most: Sequence[int]) -> Consumed:
        following, since = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
        return nothing_read(self.model, rows, self.room, np.asarray(most, np.int32), following, since)

    def _left(self, rows: list[bool]) -> None:
        """Rows whose requests have ended are free, and give back what they hold of a common memory."""
        self._held = [None if left else row for row, left in zip(self._held, rows, strict=True)]
        if None in self._axes and any(rows):
            with self._on_mesh():
                self._read = released(self._read, jnp.asarray(rows))


@dataclasses.dataclass
class _Reading:
    number: int
    ask: Ask
    read: Consumed
    done: int = 0


@dataclasses.dataclass
class _Row:
    number: int
    ask: Ask
    made: int = 0


_IDLE = _Row(-1, Ask(prompt=(), max_new=0))
