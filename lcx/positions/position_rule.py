"""Position rules: which positions the tokens of a document are given while training. What the mask sees stays their index."""

import abc
import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionRule(Spec, abc.ABC):
    """Base of every rule: pure functions of the document's length and a generator. shared: whether every document draws its
    own numbers, or all documents of a batch draw the same."""

    shared: Literal["document", "batch"] = "document"

    @abc.abstractmethod
    def positions(self, length: int, rng: np.random.Generator) -> Float[np.ndarray, "T"]:
        """Of a document of `length` tokens, float32, never falling."""

    def placed(self, length: int, rng: np.random.Generator) -> tuple[Float[np.ndarray, "T"], int | None]:
        """Positions, and the length that a length-dependent rope is to take the document for; None is its own."""
        return self.positions(length, rng), None

    @property
    @abc.abstractmethod
    def reach(self) -> int | None:
        """No position is as large; None if that depends on the document."""

    def spread(self, length: int) -> int:
        """Any two tokens of a document of at most `length` tokens are given less than so many positions apart."""
        return max(length, self.reach or 0)

    def bound(self, length: int) -> int:
        """No position of a document of at most `length` tokens is as large."""
        return max(length, self.reach or 0)

    @property
    def tells_length(self) -> bool:
        """Whether it gives documents a length that is not their own."""
        return False

    def step(self, length: int) -> float | None:
        """What the positions of a document of so many tokens are multiples of; None if they are any numbers."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoSE(PositionRule):
    """Positional skip-wise training (Zhu et al. 2024): a document in `chunks` parts, each further on by a random skip, so that
    a short one reaches any distance below `target`. One chunk moves the whole document (LongEmbed, Zhu et al. 2024).

    The released code takes two parts, the first at most half, and text that is skipped too; here the text stays whole.
    """

    target: int
    chunks: int = 2

    def validate(self):
        self.check(self.target >= 1, "target", "at least 1 token")
        self.check(self.chunks >= 1, "chunks", "at least 1")

    @property
    def reach(self):
        return self.target

    def spread(self, length):
        return length if self.chunks == 1 else max(length, self.target)

    def positions(self, length, rng):
        self.check(length <= self.target, "target", f"at least the {length} tokens of a document")
        free = self.target - length
        if self.chunks == 1:
            return np.float32(np.arange(length) + rng.integers(0, free, endpoint=True))
        if self.chunks == 2:
            starts = [int(rng.integers(1, max(1, math.ceil(length / 2)), endpoint=True))]
        else:
            starts = np.sort(rng.choice(np.arange(1, length), min(self.chunks - 1, length - 1), replace=False))
        skips = np.sort(rng.integers(0, free, len(starts), endpoint=True))
        passed = np.searchsorted(starts, np.arange(length), side="right")
        return np.float32(np.arange(length) + np.concatenate([[0], skips])[passed])

    @property
    def tells_length(self):
        return True

    def placed(self, length, rng):
        return self.positions(length, rng), self.target

    @classmethod
    def examples(cls):
        return (cls(target=64), cls(target=64, chunks=1), cls(target=64, chunks=4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPositions(PositionRule):
    """As many positions below `target`, drawn without repetition, in order (Ruoss et al. 2023)."""

    target: int

    def validate(self):
        self.check(self.target >= 1, "target", "at least 1 token")

    @property
    def reach(self):
        return self.target

    def positions(self, length, rng):
        self.check(length <= self.target, "target", f"at least the {length} tokens of a document")
        return np.sort(rng.choice(self.target, length, replace=False)).astype(np.float32)

    @classmethod
    def examples(cls):
        return (cls(target=64),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSteps(PositionRule):
    """Steps between neighbours from [0, 2), shrunk where the last would leave the length (Giraffe, Pal et al. 2023)."""

    @property
    def reach(self):
        return None

    def step(self, length):
        return None

    def positions(self, length, rng):
        places = np.cumsum(rng.uniform(0, 2, length))
        return np.float32(places * min(1.0, length / places[-1]))

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseAndMoved(PositionRule):
    """E2-LLM (Liu et al. 2024): (p + o) / g with g drawn from 1 to `densest`, and o, 0 for the first `sinks` tokens, up to
    g * original_length - the document's length. One training serves every window up to densest * original_length, read with
    `LinearInterpolation`. As published the draw is the batch's."""

    densest: int
    original_length: int
    sinks: int = 4

    def validate(self):
        self.check(self.densest >= 1, "densest", "at least 1")
        self.check(self.original_length >= 1, "original_length", "at least 1 token")
        self.check(self.sinks >= 0, "sinks", "at least 0")

    @property
    def reach(self):
        return None

    def bound(self, length):
        return max(length, self.original_length)

    def spread(self, length):
        return max(length, self.original_length if self.sinks else 0)

    def step(self, length):
        return 1 / self.densest

    def positions(self, length, rng):
        density = int(rng.integers(1, self.densest, endpoint=True))
        offset = int(rng.integers(0, max(0, density * self.original_length - length), endpoint=True))
        places = np.arange(length)
        return np.float32((places + np.where(places < self.sinks, 0, offset)) / density)

    @classmethod
    def examples(cls):
        return (cls(densest=4, original_length=16),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkSlots(PositionRule):
    """LOGO's positional indices (Tang et al. 2024): the range up to `target` in as many equal slots as the document has
    `chunks`; each chunk stands somewhere in its own, the last `tail` tokens, question and answer, at the end of the range."""

    target: int
    chunks: int = 16
    tail: int = 0

    def validate(self):
        self.check(self.chunks >= 1, "chunks", "at least 1")
        self.check(self.tail >= 0, "tail", "at least 0")
        self.check(self.target > self.tail, "target", f"more than tail = {self.tail}")

    @property
    def reach(self):
        return self.target

    def positions(self, length, rng):
        self.check(length <= self.target, "target", f"at least the {length} tokens of a document")
        context = max(0, length - self.tail)
        slot = (self.target - self.tail) // self.chunks
        chunk = math.ceil(context / self.chunks)
        self.check(chunk <= slot, "chunks", f"slots of {slot} positions that hold the {chunk} tokens of a chunk")
        places = np.arange(context)
        starts = np.arange(self.chunks) * slot + rng.integers(0, slot - chunk, self.chunks, endpoint=True)
        found = starts[places // chunk] + places % chunk if context else places
        return np.float32(np.concatenate([found, self.target - (length - context) + np.arange(length - context)]))

    @classmethod
    def examples(cls):
        return (cls(target=64, chunks=4), cls(target=64, chunks=2, tail=3))
