"""Synthetic copying: what small models learn to look back by, and what shows how far back they can look.

`Copies`: random letters written at two places of a text; the second time they can only be copied. `Tiles`: a random string
again and again, which teaches copying much sooner than text does (induction, Olsson et al. 2022). Examples as in `recall`.
"""

import dataclasses

import numpy as np

from lcx.data.recall import Recall, RecallExample, TaskDoesNotFit, cut, haystack_of
from lcx.data.sources import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies(Recall):
    """span: letters that are copied; of the copy, all but the first `cue` are answers. haystack: None is the noise sentences.

    far: the copy stands at the end and its source at least so many tokens before it, or as many as the length has room for; 0
    puts both anywhere. In a row that is trained on, every token counts (`loss` `all`).
    """

    span: int = 24
    cue: int = 4
    far: int = 0
    haystack: Source | None = None

    def validate(self):
        super().validate()
        self.check(self.span >= 2, "span", "at least 2 letters")
        self.check(1 <= self.cue < self.span, "cue", f"from 1 to span - 1 = {self.span - 1}")
        self.check(self.far >= 0, "far", "0 or a positive number")

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        rng = self.generator(i, seed, split)
        written = _letters(rng, self.span)
        offset, first, second = rng.random(3)
        letters, cue = tokenizer.encode(written), len(tokenizer.encode(written[: self.cue]))
        size = len(letters)
        room = length - 2 * size
        if room < 0:
            raise TaskDoesNotFit(self, length, 2 * size)
        text = cut(haystack_of(self.haystack, tokenizer), offset, room)
        before = max(0, room - max(0, self.far - size)) if self.far else room  # tokens that may stand before the source
        source = min(int((first if depth is None else depth) * (before + 1)), before)
        copy = room if self.far else source + min(int(second * (room - source + 1)), room - source)
        ids = np.concatenate([text[:source], letters, text[source:copy], letters, text[copy:]])
        start = copy + size
        return RecallExample(ids, ((start + cue, start + size),), (source / max(1, before),))

    @classmethod
    def examples(cls):
        return (cls(), cls(span=6, cue=2, far=20, loss="all"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles(Recall):
    """A random string of `shortest` to `longest` letters, as often as it fits; all but the first time it is the answer."""

    shortest: int = 8
    longest: int = 64

    def validate(self):
        super().validate()
        self.check(self.shortest >= 1, "shortest", "at least 1 letter")
        self.check(self.longest >= self.shortest, "longest", f"at least shortest = {self.shortest}")

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        if depth is not None:
            raise ValueError("Tiles: depth is not a setting: every letter but the first string's is an answer")
        rng = self.generator(i, seed, split)
        once = tokenizer.encode(_letters(rng, int(rng.integers(self.shortest, self.longest + 1))))
        most = max(len(once), len(tokenizer.encode("a" * self.longest)))
        if most >= length:
            raise TaskDoesNotFit(self, length, most + 1)
        return RecallExample(np.resize(once, length), ((len(once), length),), (0.0,))

    @classmethod
    def examples(cls):
        return (cls(), cls(shortest=2, longest=5, loss="all"))


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join(map(chr, rng.integers(ord("a"), ord("z") + 1, count)))
