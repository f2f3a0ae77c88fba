"""Videos of random symbols with questions behind them: what shows whether positions of frames, rows and columns are read.

A frame is a grid of symbols, a token each. A question is a mark, a symbol that the video has once, and the answer: what stands
on its right, below it, or at its place in the next frame. Finding the symbol is recall, whatever the distance; the step from
there is one of a single place on one axis. So the synthetic video of HoPE's and GIRAFFE's questions (which frame, which cell).
"""

import dataclasses
from typing import Literal

import numpy as np

from lcx.data.recall import Recall, RecallExample, TaskDoesNotFit
from lcx.positions.visual import Grid, Text, VisualPositions

Step = Literal["right", "below", "next"]
STEPS: dict[Step, tuple[int, int, int]] = {"right": (0, 0, 1), "below": (0, 1, 0), "next": (1, 0, 0)}
MARKS: dict[Step, str] = {"right": ">", "below": "_", "next": "+"}
SYMBOLS = "".join(chr(n) for n in range(33, 127) if chr(n) not in MARKS.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames(Recall):
    """height, width: of a frame. frames: fewest and most of a video; None is as many as fit. steps: the kinds of questions,
    drawn anew for each of `questions`. positions: the rule that places the tokens; None is the index. The video is the same
    under every rule.
    """

    height: int = 4
    width: int = 4
    frames: tuple[int, int] | None = None
    questions: int = 8
    steps: tuple[Step, ...] = ("right", "below", "next")
    positions: VisualPositions | None = None

    def validate(self):
        super().validate()
        self.check(self.height >= 2, "height", "at least 2")
        self.check(self.width >= 2, "width", "at least 2")
        fits = self.frames is None or 2 <= self.frames[0] <= self.frames[1]
        self.check(fits, "frames", "fewest and most, at least 2, or None")
        self.check(1 <= self.questions <= self._most, "questions", f"from 1 to {self._most}, half the symbols of two frames")
        self.check(len(set(self.steps)) == len(self.steps) >= 1, "steps", f"distinct ones of {tuple(STEPS)}")

    @property
    def _most(self) -> int:
        return min(self.height * self.width, len(SYMBOLS) // 2)

    @property
    def position_axes(self):
        return None if self.positions is None else self.positions.axes

    @property
    def content(self):
        return dataclasses.replace(super().content, positions=None)

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        rng = self.generator(i, seed, split)
        size, asked = self.height * self.width, 3 * self.questions
        fewest = 2 if self.frames is None else self.frames[0]
        if length < fewest * size + asked:
            raise TaskDoesNotFit(self, length, fewest * size + asked)
        most = (length - asked) // size
        count = most if self.frames is None else int(rng.integers(fewest, min(most, self.frames[1]) + 1))
        grid = Grid(count, self.height, self.width)
        steps = [self.steps[n] for n in rng.integers(len(self.steps), size=self.questions)]
        symbols = rng.permutation(len(SYMBOLS))
        video = rng.choice(symbols[self.questions :], size=grid)
        places = self._places(rng, grid, steps, depth)
        for place, symbol in zip(places, symbols, strict=False):
            video[place] = symbol
        letters = lambda numbers: "".join(SYMBOLS[n] for n in numbers)
        text = letters(video.ravel())
        for step, place in zip(steps, places, strict=True):
            answer = tuple(np.add(place, STEPS[step]))
            text += MARKS[step] + letters((video[place], video[answer]))
        ids = tokenizer.encode(text)
        if len(ids) != count * size + asked:
            raise ValueError(f"Frames: {len(ids)} tokens of {len(text)} symbols: expected a tokenizer with a token a symbol")
        first = count * size + 2
        answers = tuple((first + 3 * n, first + 3 * n + 1) for n in range(self.questions))
        placed = None if self.positions is None else self.positions.place((grid, Text(asked)), rng)
        return RecallExample(ids, answers, tuple(place[0] / (count - 1) for place in places), placed)

    def _places(self, rng: np.random.Generator, grid: Grid, steps: list[Step], depth: float | None) -> list[tuple[int, ...]]:
        """Of the symbols that are asked for, each with a neighbour in its step; the first at a depth."""
        found: list[tuple[int, ...]] = []
        for step in steps:
            while True:
                inside = np.subtract(grid, STEPS[step])
                place = rng.integers(inside)
                if depth is not None and not found:
                    place[0] = min(int(depth * inside[0]), inside[0] - 1)
                if tuple(place.tolist()) not in found:
                    found.append(tuple(place.tolist()))
                    break
        return found

    @classmethod
    def examples(cls):
        from lcx.positions.visual import MRopePositions

        return (cls(height=2, width=2, questions=2), cls(height=2, width=3, frames=(2, 3), positions=MRopePositions()))
