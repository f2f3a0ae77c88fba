"""What videos of random symbols share: a frame is a grid of symbols, a token each, placed by a rule for visual documents."""

import abc
import dataclasses
import math
import string

import numpy as np
from jaxtyping import Int

from lcx.data.recall import Recall
from lcx.data.tokenizers import Tokenizer
from lcx.positions.visual import Grid, Placed, Text, VisualPositions

SYMBOLS = string.ascii_lowercase + string.digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video(Recall):
    """height, width: of a frame. positions: the rule that places the tokens; None is the index. The video is the same under
    every rule.
    """

    height: int = 4
    width: int = 4
    positions: VisualPositions | None = None

    def validate(self):
        super().validate()
        self.check(self.height >= 2, "height", "at least 2")
        self.check(self.width >= 2, "width", "at least 2")

    @property
    @abc.abstractmethod
    def text(self) -> int:
        """Tokens of text behind the video."""

    @property
    def most(self) -> int | None:
        """Frames of the longest video; None is as many as fit."""
        return None

    @property
    def position_axes(self):
        return None if self.positions is None else self.positions.axes

    def spread(self, length):
        most = (length - self.text) // (self.height * self.width)
        if self.positions is None or most < 1:
            return length
        grid = Grid(most if self.most is None else min(most, self.most), self.height, self.width)
        drawn = (self.place(grid, np.random.default_rng(n)) for n in range(8))
        return max(length, *(math.ceil(np.ptp(placed.positions)) + 1 for placed in drawn))

    @property
    def content(self):
        return dataclasses.replace(super().content, positions=None)

    def place(self, grid: Grid, rng: np.random.Generator) -> Placed | None:
        """Positions of a video and the text behind it."""
        parts = (grid, Text(self.text)) if self.text else (grid,)
        return None if self.positions is None else self.positions.place(parts, rng)

    def encoded(self, tokenizer: Tokenizer, text: str) -> Int[np.ndarray, "T"]:
        """A token a symbol. Raises ValueError for a tokenizer that has not one for each."""
        ids = tokenizer.encode(text)
        if len(ids) != len(text):
            expected = "expected a tokenizer with a token a symbol"
            raise ValueError(f"{type(self).__name__}: {len(ids)} tokens of {len(text)} symbols: {expected}")
        return ids


def letters(numbers) -> str:
    """Symbols by number, an array or sequence of them, in one string."""
    return "".join(SYMBOLS[n] for n in np.ravel(numbers))
