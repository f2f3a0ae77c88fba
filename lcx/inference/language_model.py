"""LanguageModel: all that evaluation and agents know of a model. Requests in, results out, in the same order.

`LocalModel` runs a decoder on this machine: it groups requests by kind and padded length, so XLA compiles once a bucket, and
a result never depends on what else is in the list.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from lcx.data.tokenizers import Tokenizer
from lcx.inference.decoding import checked_seed
from lcx.inference.forward import embeddings, token_logprobs
from lcx.inference.generate import Generated, Until, generate
from lcx.inference.placed import padded_positions
from lcx.inference.requests import (
    Embed,
    EmbedOut,
    Gen,
    GenOut,
    Request,
    Result,
    Score,
    ScoreOut,
    Unsupported,
    WindowOverflow,
)
from lcx.inference.rereading import rereading
from lcx.inference.sampling import Sampling
from lcx.inference.shapes import bucket, right_padded
from lcx.inference.streamed import by_token, exact, streamed_logprobs
from lcx.models.decoder import DecoderModel
from lcx.positions.visual import Placed


class LanguageModel(Protocol):
    """window: most tokens of prompt and answer. caps: the kinds of request it serves."""

    window: int
    caps: frozenset[str]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def count(self, text: str) -> int: ...
    def run(self, requests: Sequence[Request]) -> list[Result]: ...


@runtime_checkable
class TokenModel(Protocol):
    """What tasks that measure in tokens need: rows of ids in, numbers out. `LocalModel` says what each call means."""

    tokenizer: Tokenizer
    window: int

    def encode(self, text: str) -> list[int]: ...
    def logprobs(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], *, placed: Sequence[Placed] | None = None
    ) -> list["Scored"]: ...
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new: int, *, placed: Sequence[Placed] | None = None
    ) -> list[Generated]: ...


class Scored(NamedTuple):
    """Of the tokens from a row's start on: log-probability, and whether it was the likeliest."""

    logprobs: Float[np.ndarray, "N"]
    greedy: Bool[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """A decoder and its tokenizer on this machine. row_tokens: tokens of a forward pass, which decides the rows of a batch.

    chunk: tokens of a prompt that are read at a time. step: those behind it that are scored at a time, where a cache drops or
    rounds: what a model knows then depends on how it read, and rows are read as a server would; one where a cache selects.

    Raises ValueError if the model lacks ids of the tokenizer.
    """

    model: DecoderModel
    tokenizer: Tokenizer
    window: int
    row_tokens: int = 8192
    chunk: int = 512
    step: int = 32
    caps = frozenset({"Gen", "Score", "Embed"})

    def __post_init__(self):
        vocab, size = self.model.spec.vocab, self.tokenizer.size
        if vocab < size:
            raise ValueError(f"a model of vocab = {vocab}: expected at least the {size} ids of the tokenizer")
        policy = rereading(self.model.spec)
        if policy is not None and (said := policy.misread(self.tokenizer.encode)):
            raise ValueError(said)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that stands at the beginning, with what the tokenizer puts ahead of one."""
        return self.tokenizer.prompt(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def run(self, requests: Sequence[Any]) -> list[Result]:
        """Results in the order of the requests.

        Raises Unsupported, WindowOverflow or ValueError for a request that cannot be served, before anything runs.
        """
        kinds = {Gen: self._generate, Score: self._score, Embed: self._embed}
        rows = [self._checked(request) for request in requests]
        results: dict[int, Result] = {}
        for kind, serve in kinds.items():
            chosen = [n for n, request in enumerate(requests) if isinstance(request, kind)]
            served = serve([requests[n] for n in chosen], [rows[n] for n in chosen]) if chosen else []
            results |= dict(zip(chosen, served, strict=True))
        return [results[n] for n in range(len(requests))]

    def logprobs(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], *, placed: Sequence[Placed] | None = None
    ) -> list[Scored]:
        """Log-probabilities of `row[start:]` given what stands before each token; every start is at least 1. placed: positions
        of each row; None is the index."""
        for row, start in zip(rows, starts, strict=True):
            self._fit(len(row), 0)
            if not 1 <= start <= len(row):
                raise ValueError(f"logprobs: start = {start} in a row of {len(row)} tokens: expected from 1 to its length")
        found: dict[int, Scored] = {}
        if not exact(self.model.spec):
            if placed is not None:
                raise ValueError("logprobs: placed rows with a cache that drops or rounds: expected a DenseCache")
            for members, _, size in self._batches(rows):
                mine, begin = [rows[n] for n in members], [starts[n] for n in members]
                step = 1 if by_token(self.model.spec) else self.step
                logprobs, greedy = streamed_logprobs(self.model, mine, begin, size=size, chunk=self.chunk, step=step)
                counts = [len(row) - start for row, start in zip(mine, begin, strict=True)]
                found |= {
                    n: Scored(logprobs[b, :c], greedy[b, :c]) for b, (n, c) in enumerate(zip(members, counts, strict=True))
                }
            return [found[n] for n in range(len(rows))]
        for members, length, size in self._batches(rows):
            mine = [rows[n] for n in members]
            padded = right_padded(mine, length, size, self.model.spec.vocab)
            if placed is not None:
                own = [placed[n] for n in members]
                padded = (*padded, padded_positions(self.model.spec, mine, own, length, size))
            logprobs, greedy = map(np.asarray, token_logprobs(self.model, *padded))
            for b, n in enumerate(members):
                here = slice(starts[n] - 1, len(rows[n]) - 1)
                found[n] = Scored(logprobs[b, here], greedy[b, here])
        return [found[n] for n in range(len(rows))]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int] | None = None,
        until: Sequence[Until | None] | None = None,
        placed: Sequence[Placed] | None = None,
    ) -> list[Generated]:
        """New tokens after each prompt of ids, ended by the tokenizer's end token or after `max_new`; see `generate`."""
        for prompt in prompts:
            self._fit(len(prompt), max_new)
        seeds = range(len(prompts)) if seeds is None else seeds
        until = [None] * len(prompts) if until is None else until
        found: dict[int, Generated] = {}
        options = {"max_new": max_new, "sampling": sampling, "stop": self.tokenizer.stops, "chunk": self.chunk}
        for members, _, _ in self._batches(prompts, extra=max_new):
            own = {"seeds": [seeds[n] for n in members], "until": [until[n] for n in members]}
            own["placed"] = None if placed is None else [placed[n] for n in members]
            made = generate(self.model, [prompts[n] for n in members], **own, **options)
            found |= dict(zip(members, made, strict=True))
        return [found[n] for n in range(len(prompts))]

    def embed(self, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "N M"]:
        """The mean of each row's last hidden states, scaled to length 1."""
        for row in rows:
            self._fit(len(row), 0)
        vectors = np.zeros((len(rows), self.model.spec.width), np.float32)
        for members, length, size in self._batches(rows):
            padded = right_padded([rows[n] for n in members], length, size, self.model.spec.vocab)
            vectors[members] = embeddings(self.model, *padded)[: len(members)]
        return vectors

    def _fit(self, n_prompt: int, max_new: int) -> None:
        if n_prompt + max_new > self.window:
            raise WindowOverflow(n_prompt, max_new, self.window)
        if n_prompt == 0:
            raise ValueError("an empty prompt: expected at least one token")

    def _batches(self, rows: Sequence[Sequence[int]], extra: int = 0) -> Iterator[tuple[list[int], int, int]]:
        """(members, length, size) of rows that share a bucket; `size`, a power of two, is the rows of their batch."""
        buckets: dict[int, list[int]] = {}
        for n, row in enumerate(rows):
            buckets.setdefault(bucket(len(row)), []).append(n)
        for length, members in sorted(buckets.items()):
            most = max(1, self.row_tokens // (length + extra))
            size = min(1 << most.bit_length() - 1, 1 << (len(members) - 1).bit_length())
            for first in range(0, len(members), size):
                yield members[first : first + size], length, size

    def _checked(self, request: Any) -> list[list[int]]:
        """The ids of every text of a request that can be served."""
        if isinstance(request, Embed):
            rows = [self.prompt(text) for text in request.texts]
            for row in rows:
                self._fit(len(row), 0)
            return rows
        if not isinstance(request, Gen | Score):
            raise Unsupported(request, self.caps)
        prompt = self.prompt(request.prompt)
        if isinstance(request, Score):
            rows = [self.encode(text) for text in request.continuations]
            self._fit(len(prompt), max(map(len, rows), default=0))
            return [prompt, *rows]
        self._fit(len(prompt), request.max_new)
        if request.max_new < 1 or "" in request.stop:
            raise ValueError(f"{request}: expected max_new of at least 1 and no empty stop string")
        checked_seed(request.seed)
        return [prompt]

    def _generate(self, requests: list[Gen], rows: list[list[list[int]]]) -> list[GenOut]:
        made: dict[int, Generated] = {}
        for max_new, sampling in dict.fromkeys((r.max_new, r.sampling) for r in requests):
            alike = [n for n, r in enumerate(requests) if (r.max_new, r.sampling) == (max_new, sampling)]
            prompts, seeds = [rows[n][0] for n in alike], [requests[n].seed for n in alike]
            until = [self._contains(requests[n].stop) for n in alike]
            made |= dict(zip(alike, self.generate(prompts, max_new, sampling, seeds, until), strict=True))
        return [self._cut(made[n], r.stop, len(rows[n][0])) for n, r in enumerate(requests)]

    def _contains(self, stops: tuple[str, ...]) -> Until | None:
        return (lambda ids: any(stop in self.decode(ids) for stop in stops)) if stops else None

    def _cut(self, row: Generated, stops: tuple[str, ...], n_prompt: int) -> GenOut:
        """The text before the stop string that was complete first, and the tokens up to its completion."""
        contains = self._contains(stops)
        if contains is None or not contains(row.ids):
            return GenOut(self.decode(row.ids), row.ids, row.logprobs, row.finish, n_prompt)
        needed = next(n for n in range(1, len(row.ids) + 1) if contains(row.ids[:n]))
        text = self.decode(row.ids[:needed])
        place = min(text.find(stop) for stop in stops if stop in text)
        return GenOut(text[:place], row.ids[:needed], row.logprobs[:needed], "stop", n_prompt)

    def _score(self, requests: list[Score], rows: list[list[list[int]]]) -> list[ScoreOut]:
        whole = [prompt + continuation for prompt, *continuations in rows for continuation in continuations]
        starts = [len(prompt) for prompt, *continuations in rows for _ in continuations]
        scored = iter(self.logprobs(whole, starts))
        results = []
        for prompt, *continuations in rows:
            mine = [next(scored) for _ in continuations]
            sums = [float(s.logprobs.sum(dtype=np.float64)) for s in mine]
            results.append(ScoreOut([s.logprobs.tolist() for s in mine], sums, [s.greedy.tolist() for s in mine], len(prompt)))
        return results

    def _embed(self, requests: list[Embed], rows: list[list[list[int]]]) -> list[EmbedOut]:
        vectors = self.embed([row for texts in rows for row in texts])
        ends = np.cumsum([len(texts) for texts in rows])
        return [EmbedOut(part) for part in np.split(vectors, ends[:-1])]
