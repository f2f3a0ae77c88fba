"""A still picture seen through flicker: what shows whether the same place is found again in frames however far back.

Each cell of a frame shows the picture or, as often as not, any symbol; the last frame is the picture, to be told from what all
frames before had there. A head that looks at one cell of all frames does that: on axes of its own a cell is at one place in
each, on one axis at every multiple of the frame.
"""

import dataclasses

import numpy as np

from lcx.data.recall import RecallExample, TaskDoesNotFit
from lcx.data.video import SYMBOLS, Video, letters
from lcx.positions.visual import Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Still(Video):
    """As many frames as fit. shown: the share of cells that show the picture. Answers are the cells of the last frame that some
    frame showed, but those of its first column: the token before stands in another row.
    """

    shown: float = 0.5

    def validate(self):
        super().validate()
        self.check(0 < self.shown <= 1, "shown", "a share in (0, 1]")

    @property
    def text(self):
        return 0

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        if depth is not None:
            raise ValueError("Still: depth is not a setting: every frame shows a part of the picture")
        size = self.height * self.width
        if length < 2 * size:
            raise TaskDoesNotFit(self, length, 2 * size)
        rng, grid = self.generator(i, seed, split), Grid(length // size, self.height, self.width)
        picture = rng.integers(0, len(SYMBOLS), grid[1:])
        video = rng.integers(0, len(SYMBOLS), grid)
        shows = rng.random(grid) < self.shown
        shows[0, 0, 1] |= not shows[:-1, :, 1:].any()  # at least one answer
        shows[-1] = True
        video = np.where(shows, picture, video)
        asked = [n for n in np.flatnonzero(shows[:-1].any(axis=0)) if n % self.width]
        first = size * (len(video) - 1)
        answers = tuple((int(first + n), int(first + n) + 1) for n in asked)
        depths = tuple(float(np.argmax(shows[:, *divmod(n, self.width)]) / max(1, len(video) - 2)) for n in asked)
        return RecallExample(self.encoded(tokenizer, letters(video)), answers, depths, self.place(grid, rng))

    @classmethod
    def examples(cls):
        from lcx.positions.visual import MRopePositions

        return (cls(height=2, width=2), cls(height=2, width=3, shown=0.8, positions=MRopePositions()))
