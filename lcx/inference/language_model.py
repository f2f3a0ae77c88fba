"""LanguageModel: all that evaluation and agents know of a model. Requests in, results out, in the same order.

`LocalModel` runs a decoder on this machine: it groups requests by kind and padded length, so XLA compiles once a bucket, and
a result never depends on what else is in the list.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import PADDING, Batch, causal_info
from lcx.data.tokenizers import Tokenizer
from lcx.inference.generate import Generated, generate
from lcx.inference.sampling import Sampling
from lcx.inference.shapes import bucket, right_padded
from lcx.models.decoder import DecoderModel

HEAD_CHUNK = 128  # tokens whose logits exist at once


class WindowOverflow(ValueError):
    """The prompt and the tokens asked for do not fit the window. Nothing was truncated."""

    def __init__(self, n_prompt: int, max_new: int, window: int):
        super().__init__(f"prompt of {n_prompt} tokens + {max_new} new ones: expected at most window = {window}")
        self.n_prompt, self.max_new, self.window = n_prompt, max_new, window


class Gen(NamedTuple):
    """Continue `prompt` by up to `max_new` tokens; the text ends before the first of the `stop` strings."""

    prompt: str
    max_new: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    seed: int = 0


class Score(NamedTuple):
    """Log-probability of each continuation after `prompt`."""

    prompt: str
    continuations: tuple[str, ...]


class Embed(NamedTuple):
    """A vector for each text: the mean of its last hidden states, of length 1."""

    texts: tuple[str, ...]


class GenOut(NamedTuple):
    text: str
    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    n_prompt: int


class ScoreOut(NamedTuple):
    """One entry a continuation: the log-probability of each token, their sum, and whether each was the likeliest."""

    token_logprobs: list[list[float]]
    sums: list[float]
    greedy: list[list[bool]]
    n_prompt: int


class EmbedOut(NamedTuple):
    vectors: Float[np.ndarray, "N M"]


Request = Gen | Score | Embed
Result = GenOut | ScoreOut | EmbedOut


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
    def logprobs(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list["Scored"]: ...
    def generate(self, prompts: Sequence[Sequence[int]], max_new: int) -> list[Generated]: ...


class Scored(NamedTuple):
    """Of the tokens from a row's start on: log-probability, and whether it was the likeliest."""

    logprobs: Float[np.ndarray, "N"]
    greedy: Bool[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """A decoder and its tokenizer on this machine. row_tokens: tokens of a forward pass, which decides the rows of a batch."""

    model: DecoderModel
    tokenizer: Tokenizer
    window: int
    row_tokens: int = 8192
    caps = frozenset({"gen", "score", "embed"})

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Raises WindowOverflow for a request that does not fit, before anything runs."""
        results: dict[int, Result] = {}
        results |= self._generate({n: r for n, r in enumerate(requests) if isinstance(r, Gen)})
        results |= self._score({n: r for n, r in enumerate(requests) if isinstance(r, Score)})
        for n, request in enumerate(requests):
            if isinstance(request, Embed):
                results[n] = EmbedOut(self.embed([self.encode(text) for text in request.texts]))
        return [results[n] for n in range(len(requests))]

    def logprobs(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Scored]:
        """Log-probabilities of `row[start:]` given what stands before each token; every start is at least 1."""
        for row, start in zip(rows, starts, strict=True):
            self._fit(len(row), 0)
            if not 1 <= start <= len(row):
                raise ValueError(f"logprobs: start = {start} in a row of {len(row)} tokens: expected from 1 to its length")
        found: dict[int, Scored] = {}
        for members, tokens, segments in self._batches(rows):
            logprobs, greedy = map(np.asarray, _score(self.model, tokens, segments))
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
    ) -> list[Generated]:
        """New tokens after each prompt of ids, ended by the tokenizer's end token or after `max_new`."""
        for prompt in prompts:
            self._fit(len(prompt), max_new)
        seeds = range(len(prompts)) if seeds is None else seeds
        found: dict[int, Generated] = {}
        options = {"max_new": max_new, "sampling": sampling, "stop": (self.tokenizer.eos,)}
        for members, _, _ in self._batches(prompts, extra=max_new):
            made = generate(self.model, [prompts[n] for n in members], seeds=[seeds[n] for n in members], **options)
            found |= dict(zip(members, made, strict=True))
        return [found[n] for n in range(len(prompts))]

    def embed(self, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "N M"]:
        """The mean of each row's last hidden states, scaled to length 1."""
        for row in rows:
            self._fit(len(row), 0)
        found: dict[int, np.ndarray] = {}
        for members, tokens, segments in self._batches(rows):
            vectors = np.asarray(_embed(self.model, tokens, segments))
            found |= {n: vectors[b] for b, n in enumerate(members)}
        return np.stack([found[n] for n in range(len(rows))])

    def _fit(self, n_prompt: int, max_new: int) -> None:
        if n_prompt + max_new > self.window:
            raise WindowOverflow(n_prompt, max_new, self.window)
        if n_prompt == 0:
            raise ValueError("an empty prompt: expected at least one token")

    def _batches(self, rows: Sequence[Sequence[int]], extra: int = 0):
        """(members, tokens, segments) of rows that share a bucket; a batch has a fixed number of rows a bucket."""
        buckets: dict[int, list[int]] = {}
        for n, row in enumerate(rows):
            buckets.setdefault(bucket(len(row)), []).append(n)
        for length, members in sorted(buckets.items()):
            size = max(1, self.row_tokens // (length + extra))
            size = min(size, 1 << (len(members) - 1).bit_length())
            for first in range(0, len(members), size):
                part = members[first : first + size]
                yield part, *right_padded([rows[n] for n in part], length, size)

    def _generate(self, requests: dict[int, Gen]) -> dict[int, Result]:
        prompts = {n: self.encode(request.prompt) for n, request in requests.items()}
        for n, request in requests.items():
            self._fit(len(prompts[n]), request.max_new)
        results: dict[int, Result] = {}
        for max_new, sampling in dict.fromkeys((r.max_new, r.sampling) for r in requests.values()):
            alike = [n for n, r in requests.items() if (r.max_new, r.sampling) == (max_new, sampling)]
            made = self.generate([prompts[n] for n in alike], max_new, sampling, [requests[n].seed for n in alike])
            for n, row in zip(alike, made, strict=True):
                results[n] = self._cut(row, requests[n].stop, len(prompts[n]))
        return results

    def _cut(self, row: Generated, stops: tuple[str, ...], n_prompt: int) -> GenOut:
        """The generated text up to the first stop string, and the tokens that were needed to see it."""
        text = self.decode(row.ids)
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if not places:
            return GenOut(text, row.ids, row.logprobs, row.finish, n_prompt)
        needed = next(n for n in range(len(row.ids) + 1) if any(stop in self.decode(row.ids[:n]) for stop in stops))
        return GenOut(text[: min(places)], row.ids[:needed], row.logprobs[:needed], "stop", n_prompt)

    def _score(self, requests: dict[int, Score]) -> dict[int, Result]:
        rows, starts, owners = [], [], []
        for n, request in requests.items():
            prompt = self.encode(request.prompt)
            for text in request.continuations:
                rows.append(prompt + self.encode(text))
                starts.append(len(prompt))
                owners.append(n)
        scored = self.logprobs(rows, starts)
        results: dict[int, Result] = {}
        for n, request in requests.items():
            mine = [s for s, owner in zip(scored, owners, strict=True) if owner == n]
            logprobs = [s.logprobs.tolist() for s in mine]
            sums, greedy = [float(s.logprobs.sum()) for s in mine], [s.greedy.tolist() for s in mine]
            results[n] = ScoreOut(logprobs, sums, greedy, self.count(request.prompt))
        return results


@jax.jit
def _score(model: DecoderModel, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]):
    """(log-probability [B,T], likeliest [B,T]) of the token after each place; the last place means nothing."""
    hidden, _, _ = model(Batch(tokens=tokens, info=causal_info(segments)))
    targets = jnp.roll(tokens, -1, axis=1)
    short = -hidden.shape[1] % HEAD_CHUNK if hidden.shape[1] > HEAD_CHUNK else 0
    chunk = min(HEAD_CHUNK, hidden.shape[1])
    pad = lambda x: jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def head(part):
        hidden, targets = part
        logits = model.logits(hidden)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return found, jnp.argmax(logits, axis=-1) == targets

    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(tokens.shape[0], -1)[:, : tokens.shape[1]]
    return jax.tree.map(join, jax.lax.map(head, (cut(hidden), cut(targets))))


@jax.jit
def _embed(model: DecoderModel, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B M"]:
    hidden, _, _ = model(Batch(tokens=tokens, info=causal_info(segments)))
    real = (segments != PADDING)[..., None]
    total = jnp.where(real, hidden.astype(jnp.float32), 0).sum(axis=1)
    return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)
