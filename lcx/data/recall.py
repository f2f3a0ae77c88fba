"""Synthetic recall: sequences whose answers stand earlier in the same sequence, to train on and to measure with.

`Needles`: sentences "Key abc is 4821." in noise or text, asked for at the end (passkey, Mohtashami and Jaggi 2023, with one
needle; multi-key recall with several). `Records`: "ab:7 " pairs, then every pair again in another order, so that each value
of the second half is an answer (associative recall; Zoology, Arora et al. 2023).

Example i is a pure function of (spec, seed, split, i): its content is drawn first and then fitted, so the same needles stand
at the same depths whatever the length; only the number of Records without `pairs` follows the length. `train` and `test`
examples come from disjoint random streams.
"""

import abc
import dataclasses
import functools
import hashlib
import string
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from lcx.data.rows import Row, Rows, RowSet
from lcx.data.sources import Source
from lcx.data.tokenizers import Tokenizer
from lcx.positions.visual import Placed
from lcx.spec import Spec

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
STREAM = 1 << 30  # examples in a stream: more than any run reads
SAMPLED = 16  # of them, for counts
MOST_LETTERS = 13  # 26^13 keys can still be numbered in 64 bits

Split = Literal["train", "test"]


class TaskDoesNotFit(ValueError):
    """The length holds not even the smallest instance, or more than the largest."""

    def __init__(self, spec: Spec, length: int, minimum: int, maximum: int | None = None):
        accepted = f"at least {minimum} tokens" if maximum is None else f"{minimum} to {maximum} tokens, or more key_letters"
        super().__init__(f"{type(spec).__name__}: length = {length}: expected {accepted}")
        self.spec, self.length, self.minimum, self.maximum = spec, length, minimum, maximum

    def beside(self, room: int) -> "TaskDoesNotFit":
        """The same of a length that has to hold `room` tokens beside the instance."""
        most = None if self.maximum is None else self.maximum + room
        return TaskDoesNotFit(self.spec, self.length + room, self.minimum + room, most)


class RecallExample(NamedTuple):
    """ids: the whole sequence. answers: token ranges [start, stop) to be predicted. depths: of each answer's source, 0 to 1.
    placed: positions of visual documents; None is the index."""

    ids: Int[np.ndarray, "T"]
    answers: tuple[tuple[int, int], ...]
    depths: tuple[float, ...]
    placed: Placed | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Rows, abc.ABC):
    """Base of the generators. loss: on the answers alone or on every token; answer_weight: of an answer's token, others 1."""

    loss: Literal["answers", "all"] = "answers"
    answer_weight: float = 1.0

    def validate(self):
        self.check(self.answer_weight > 0, "answer_weight", "a positive number")

    @abc.abstractmethod
    def example(
        self,
        tokenizer: Tokenizer,
        length: int,
        i: int,
        *,
        seed: int,
        split: Split,
        depth: float | None = None,
    ) -> RecallExample:
        """Example i, of at most `length` tokens; the first answer's source stands at `depth` (0 the start), else anywhere."""

    def check_fit(self, tokenizer, length):
        self.example(tokenizer, length, 0, seed=0, split="train")

    def rows(self, tokenizer, length, seed):
        self.check_fit(tokenizer, length)
        return RecallRows(self, tokenizer, length, seed)

    def documents(self, length):
        return 1

    @property
    def content(self) -> "Recall":
        """What decides the examples."""
        return dataclasses.replace(self, loss="answers", answer_weight=1.0)

    def generator(self, i: int, seed: int, split: str) -> np.random.Generator:
        """The random stream of example i."""
        key = hashlib.sha256(f"{self.content!r}/{seed}/{split}/{i}".encode()).digest()[:16]
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


class RecallRows(RowSet):
    """Training rows of one document each, padded at the end where the example is shorter."""

    def __init__(self, spec: Recall, tokenizer: Tokenizer, length: int, seed: int):
        self._spec, self._tokenizer, self._length, self._seed = spec, tokenizer, length, seed

    def __len__(self) -> int:
        return STREAM

    def __getitem__(self, i: int) -> Row:
        example = self._spec.example(self._tokenizer, self._length, i, seed=self._seed, split="train")
        ids, answers, placed = example.ids, example.answers, example.placed
        tokens = np.full(self._length, self._tokenizer.pad, np.int32)
        targets, segments, weights = tokens.copy(), np.zeros_like(tokens), np.zeros(self._length, np.float32)
        tokens[: len(ids)], targets[: len(ids) - 1], segments[: len(ids)] = ids, ids[1:], 1
        if self._spec.loss == "all":
            weights[: len(ids) - 1] = 1
        for start, stop in answers:
            weights[start - 1 : stop - 1] = self._spec.answer_weight
        if placed is None:
            return Row(tokens, targets, weights, segments)
        positions = np.zeros((self._length, placed.positions.shape[1]), np.float32)
        positions[: len(ids)] = placed.positions
        return Row(tokens, targets, weights, segments, positions)

    def counts(self) -> dict[str, int]:
        """Of the first rows of the endless stream; an example is never split or cut."""
        kept = sum(int((self[i].segments > 0).sum()) for i in range(SAMPLED))
        counts = {"rows_sampled": SAMPLED, "tokens": kept, "tokens_split": 0, "tokens_dropped": 0}
        return counts | {"tokens_padded": SAMPLED * self._length - kept}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles(Recall):
    """needles: sentences in the haystack; queries: how many of them are asked for. haystack: None is the noise sentences."""

    needles: int = 1
    queries: int = 1
    key_letters: int = 3
    value_digits: int = 4
    haystack: Source | None = None

    def validate(self):
        super().validate()
        for field in ("needles", "value_digits"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(1 <= self.key_letters <= MOST_LETTERS, "key_letters", f"from 1 to {MOST_LETTERS}")
        self.check(1 <= self.queries <= self.needles, "queries", f"from 1 to needles = {self.needles}")
        self.check(self.needles <= 26**self.key_letters, "needles", f"at most {26**self.key_letters}, so that keys differ")

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"Needles: depth = {depth}: expected a number from 0 (the start) to 1")
        rng = self.generator(i, seed, split)
        keys = _distinct_keys(rng, self.needles, self.key_letters)
        values = ["".join(map(str, rng.integers(0, 10, self.value_digits))) for _ in keys]
        depths, offset = rng.random(self.needles), rng.random()
        if depth is not None:
            depths[0] = depth
        needles = [tokenizer.encode(f"Key {key} is {value}. ") for key, value in zip(keys, values, strict=True)]
        asked = [(tokenizer.encode(f"Key {keys[n]} is"), tokenizer.encode(f" {values[n]}")) for n in range(self.queries)]
        stop = tokenizer.encode(". ")
        room = length - sum(map(len, needles)) - sum(len(q) + len(a) + len(stop) for q, a in asked)
        if room < 0:
            raise TaskDoesNotFit(self, length, length - room)
        haystack = cut(haystack_of(self.haystack, tokenizer), offset, room)
        places = np.minimum((depths * (room + 1)).astype(int), room)
        parts, answers, last = [], [], 0
        for n in np.argsort(places, kind="stable"):
            parts += [haystack[last : places[n]], needles[n]]
            last = places[n]
        parts.append(haystack[last:])
        for question, answer in asked:
            start = sum(map(len, parts)) + len(question)
            answers.append((start, start + len(answer)))
            parts += [question, answer, stop]
        return RecallExample(np.concatenate(parts), tuple(answers), tuple(float(d) for d in depths[: self.queries]))

    @classmethod
    def examples(cls):
        return (cls(), cls(needles=4, queries=2, loss="all"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(Recall):
    """Pairs "ab:7 ", as many as fit twice in the length (or `pairs`), then the same pairs as queries in another order."""

    pairs: int | None = None
    key_letters: int = 2
    value_digits: int = 1

    def validate(self):
        super().validate()
        self.check(self.value_digits >= 1, "value_digits", "at least 1")
        self.check(1 <= self.key_letters <= MOST_LETTERS, "key_letters", f"from 1 to {MOST_LETTERS}")
        most = 26**self.key_letters
        self.check(self.pairs is None or 1 <= self.pairs <= most, "pairs", f"from 1 to {most}, so that keys differ, or None")

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        if depth is not None:
            raise ValueError("Records: depth is not a setting: the answers stand at every depth")
        rng = self.generator(i, seed, split)
        size = len(tokenizer.encode("a" * self.key_letters + ":" + "0" * self.value_digits + " "))
        pairs = length // (2 * size) if self.pairs is None else self.pairs
        most = 26**self.key_letters
        if pairs < 1:
            raise TaskDoesNotFit(self, length, 2 * size)
        if pairs > most:
            raise TaskDoesNotFit(self, length, 2 * size, 2 * size * (most + 1) - 1)
        keys = _distinct_keys(rng, pairs, self.key_letters)
        values = ["".join(map(str, rng.integers(0, 10, self.value_digits))) for _ in keys]
        texts = ((f"{key}:", value, " ") for key, value in zip(keys, values, strict=True))
        encoded = [tuple(map(tokenizer.encode, text)) for text in texts]
        sizes = np.cumsum([sum(map(len, record)) for record in encoded])
        if self.pairs is None:  # records of a subword tokenizer differ in size
            pairs = int(np.searchsorted(2 * sizes, length, side="right"))
        if pairs < 1 or 2 * sizes[pairs - 1] > length:
            raise TaskDoesNotFit(self, length, int(2 * sizes[max(pairs, 1) - 1]))
        parts = [part for record in encoded[:pairs] for part in record]
        order, answers, at = rng.permutation(pairs), [], int(sizes[pairs - 1])
        for n in order:
            key, value, space = encoded[n]
            answers.append((at + len(key), at + len(key) + len(value)))
            parts += [key, value, space]
            at += len(key) + len(value) + len(space)
        return RecallExample(np.concatenate(parts), tuple(answers), tuple(float(n) / pairs for n in order))

    @classmethod
    def examples(cls):
        return (cls(), cls(pairs=3, key_letters=3, value_digits=2))


def _distinct_keys(rng: np.random.Generator, count: int, letters: int) -> list[str]:
    numbers = rng.choice(26**letters, size=count, replace=False)
    return ["".join(string.ascii_lowercase[int(n) // 26**place % 26] for place in range(letters)) for n in numbers]


def cut(haystack: np.ndarray, offset: float, room: int) -> np.ndarray:
    """`room` tokens of the endlessly repeated haystack, from a point given as a share of it."""
    start = int(offset * len(haystack))
    return np.take(haystack, np.arange(start, start + room), mode="wrap")


@functools.lru_cache(maxsize=8)
def haystack_of(source: Source | None, tokenizer: Tokenizer) -> np.ndarray:
    if source is None:
        return tokenizer.encode(NOISE)
    documents = source.documents()
    return np.concatenate([tokenizer.encode(documents[i]) for i in range(len(documents))])
