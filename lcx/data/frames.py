"""Videos of random symbols with questions behind them: what shows whether positions of frames, rows and columns are read.

A frame is a grid of symbols, a token each. A question is a mark, a symbol that the video has once, and the answer: what stands
on its right, below it, or at its place in the next frame. Finding the symbol is recall, whatever the distance; the step from
there is one of a single place on one axis. So the synthetic video of HoPE's and GIRAFFE's questions (which frame, which cell).
"""

import dataclasses
from typing import Literal

import numpy as np

from lcx.data.recall import RecallExample, TaskDoesNotFit
from lcx.data.video import SYMBOLS, Video, letters
from lcx.positions.visual import Grid

Step = Literal["right", "below", "next"]
STEPS: dict[Step, tuple[int, int, int]] = {"right": (0, 0, 1), "below": (0, 1, 0), "next": (1, 0, 0)}
MARKS: dict[Step, str] = {"right": ">", "below": "_", "next": "+"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames(Video):
    """frames: fewest and most of a video; None is as many as fit. asked: symbols with questions, one for each of `steps`."""

    frames: tuple[int, int] | None = None
    asked: int = 8
    steps: tuple[Step, ...] = ("right", "below", "next")

    def validate(self):
        super().validate()
        fits = self.frames is None or 2 <= self.frames[0] <= self.frames[1]
        self.check(fits, "frames", "fewest and most, at least 2, or None")
        most = len(SYMBOLS) // 2
        self.check(1 <= self.asked <= most, "asked", f"from 1 to {most}: other symbols fill the video")
        room = self.frames is None or self.asked <= (self.frames[0] - 1) * self._cells
        self.check(room, "asked", "at most as many as the fewest frames have cells with a neighbour each way")
        self.check(len(set(self.steps)) == len(self.steps) >= 1, "steps", f"distinct ones of {tuple(STEPS)}")

    @property
    def _cells(self) -> int:
        """Of a frame, with a neighbour on the right and below."""
        return (self.height - 1) * (self.width - 1)

    @property
    def _fewest(self) -> int:
        return 1 + -(-self.asked // self._cells) if self.frames is None else self.frames[0]

    @property
    def text(self):
        return 3 * self.asked * len(self.steps)

    @property
    def most(self):
        return None if self.frames is None else self.frames[1]

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        rng = self.generator(i, seed, split)
        size, questions = self.height * self.width, self.asked * len(self.steps)
        if length < self._fewest * size + 3 * questions:
            raise TaskDoesNotFit(self, length, self._fewest * size + 3 * questions)
        most = (length - 3 * questions) // size
        count = most if self.frames is None else int(rng.integers(self._fewest, min(most, self.frames[1]) + 1))
        grid = Grid(count, self.height, self.width)
        symbols = rng.permutation(len(SYMBOLS))
        video = rng.choice(symbols[self.asked :], size=grid)
        inside = np.subtract(grid, 1)  # where every step has an answer
        places = [np.unravel_index(n, inside) for n in rng.choice(np.prod(inside), self.asked, replace=False)]
        if depth is not None:
            first = min(int(depth * inside[0]), inside[0] - 1)
            places = [(first, *places[0][1:]), *(place for place in places[1:] if place != (first, *places[0][1:]))]
        for place, symbol in zip(places, symbols, strict=False):
            video[place] = symbol
        order = [(step, place) for place in places for step in self.steps]
        if depth is None:
            order = [order[n] for n in rng.permutation(len(order))]
        text = letters(video)
        for step, place in order:
            text += MARKS[step] + letters((video[place], video[tuple(np.add(place, STEPS[step]))]))
        ids = self.encoded(tokenizer, text)
        first = count * size + 2
        answers = tuple((first + 3 * n, first + 3 * n + 1) for n in range(len(order)))
        depths = tuple(place[0] / max(1, inside[0] - 1) for _, place in order)
        return RecallExample(ids, answers, depths, self.place(grid, rng))

    @classmethod
    def examples(cls):
        from lcx.positions.visual import MRopePositions

        return (cls(height=2, width=2, asked=1), cls(height=2, width=3, frames=(2, 3), asked=2, positions=MRopePositions()))
