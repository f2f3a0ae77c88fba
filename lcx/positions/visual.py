"""Positions of documents of text, images and video, on one axis or three: time, row, column.

A document is given as its parts in order, each text or a grid of visual tokens (frame by frame, row by row). Text stands on the
same place of every axis; what follows the document goes on from `following`.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lcx.spec import Spec


class Text(NamedTuple):
    """So many tokens, marks around images among them."""

    tokens: int


class Grid(NamedTuple):
    """Visual tokens as the language model gets them, after merging; an image has one frame."""

    frames: int
    rows: int
    columns: int

    def coordinates(self) -> Float[np.ndarray, "T 3"]:
        """Frame, row and column of each token."""
        places = np.indices(self, dtype=np.float64)
        return places.reshape(3, -1).T


@dataclasses.dataclass(frozen=True)
class Placed:
    """positions: of a document, float64. following: the place of the next text token.

    Models read float32. Raises ValueError where the step from a token to the next is less than the spacing of float32 there,
    and for what is no number.
    """

    positions: Float[np.ndarray, "T P"]
    following: float

    def __post_init__(self):
        every = np.concatenate([self.positions, self.extended(2)]).astype(np.float64)
        if not np.isfinite(every).all():
            token, axis = np.argwhere(~np.isfinite(every))[0]
            raise ValueError(f"Placed.positions: {every[token, axis]} at token {token}: expected numbers")
        nearer = np.abs(every)
        nearer = np.minimum(nearer[1:], nearer[:-1])
        steps, spacing = np.abs(np.diff(every, axis=0)), np.spacing(nearer.astype(np.float32))
        rounding = 8 * np.spacing(nearer)  # a difference that float64 itself leaves is no step
        lost = np.argwhere((rounding < steps) & (steps < spacing))
        if len(lost):
            token, axis = lost[0]
            field = "positions" if token + 1 < len(self.positions) else "following"
            raise ValueError(
                f"Placed.{field}: {every[token + 1, axis]} after {every[token, axis]} at token {token + 1}, a step of "
                f"{steps[token, axis]:.3g} where those of float32 are {spacing[token, axis]:.3g}: expected smaller positions "
                "or larger steps"
            )

    def cut(self, tokens: int) -> "Placed":
        """The first `tokens`, behind which text goes on; those cut off have to be text."""
        rest = self.positions[tokens:]
        if not len(rest):
            return self
        if (rest != rest[:1] + np.arange(len(rest))[:, None]).any() or (rest[0] != rest[0, 0]).any():
            raise ValueError(f"Placed.cut: tokens = {tokens}: expected a place from which on all tokens are text")
        return Placed(self.positions[:tokens], float(rest[0, 0]))

    def extended(self, tokens: int) -> Float[np.ndarray, "T P"]:
        """Of so many text tokens more."""
        return np.repeat((self.following + np.arange(tokens))[:, None], self.positions.shape[1], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualPositions(Spec, abc.ABC):
    """Base of every rule for mixed documents."""

    @property
    @abc.abstractmethod
    def axes(self) -> int:
        """How many position axes the tokens have."""

    @abc.abstractmethod
    def grid(self, grid: Grid, start: float, rng: np.random.Generator) -> tuple[Float[np.ndarray, "T P"], float]:
        """Positions of visual tokens where the next text token would stand at `start`, and where that stands after them."""

    def place(self, parts: Sequence[Text | Grid], rng: np.random.Generator | None = None) -> Placed:
        """Of a document; `rng` for what is drawn anew for every grid, by default one of seed 0.

        Raises ValueError for a grid without tokens, and where `Placed` does.
        """
        rng = np.random.default_rng(0) if rng is None else rng
        found, following = [np.zeros((0, self.axes))], 0.0
        for part in parts:
            if isinstance(part, Grid):
                self.check_grid(part)
                positions, following = self.grid(part, following, rng)
            else:
                positions = np.repeat((following + np.arange(part.tokens))[:, None], self.axes, axis=1)
                following += part.tokens
            found.append(positions)
        return Placed(np.concatenate(found), following)

    def check_grid(self, grid: Grid) -> None:
        """Raises ValueError for a grid without tokens."""
        if min(grid) < 1:
            raise ValueError(f"{type(self).__name__}: {grid}: expected at least one frame, row and column")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MRopePositions(VisualPositions):
    """M-RoPE's (Qwen2-VL 2024, Qwen2.5-VL 2025): a grid counts on from the text on every axis.

    time_step: of a frame, rounded down (Qwen2.5-VL: tokens a second times seconds a frame). following: text goes on behind the
    largest place of `all axes`, as published, or behind that of `rows and columns` alone (transformers 5), which differs where
    a video has more frames than rows and columns.
    """

    time_step: float = 1.0
    following: Literal["all axes", "rows and columns"] = "all axes"

    def validate(self):
        self.check(self.time_step > 0, "time_step", "a positive number")

    @property
    def axes(self):
        return 3

    def grid(self, grid, start, rng):
        places = grid.coordinates()
        places[:, 0] = np.floor(places[:, 0] * self.time_step)
        behind = places.max() if self.following == "all axes" else max(grid.rows, grid.columns) - 1
        return start + places, start + behind + 1

    @classmethod
    def examples(cls):
        return (cls(), cls(time_step=2.5, following="rows and columns"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagonalPositions(VisualPositions):
    """HoPE's and VideoRoPE's (2025): frames `gamma` apart in time, rows and columns around the time of their frame.

    gammas: one of them is drawn for every grid: in HoPE's training 0.5, 0.75, 1, 1.25 and 1.5; VideoRoPE has 2. Rows and
    columns stand below the text before them, even below 0, and text after a grid may repeat their places: as published.
    """

    gammas: tuple[float, ...] = (1.0,)

    def validate(self):
        self.check(len(self.gammas) >= 1 and min(self.gammas) > 0, "gammas", "positive numbers, at least one")

    @property
    def axes(self):
        return 3

    def grid(self, grid, start, rng):
        frame, row, column = grid.coordinates().T
        time = start + float(rng.choice(self.gammas)) * frame
        places = [time, time + row - (grid.rows - 1) // 2, time + column - (grid.columns - 1) // 2]
        return np.stack(places, axis=1), float(time.max()) + 1

    @classmethod
    def examples(cls):
        return (cls(), cls(gammas=(0.5, 0.75, 1.0, 1.25, 1.5)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class V2PEPositions(VisualPositions):
    """V2PE's (Ge et al. 2024): one axis, on which a visual token takes less than one place: stride / tokens_per_tile.

    strides: one is drawn for every grid; training draws from 1, 2, 4 to 256, evaluation has one. After a grid the place is
    rounded up. Multiples of 1 / 256 are exact in float32 up to 65,536; finer steps than float32 has are refused (`Placed`).
    """

    strides: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    tokens_per_tile: int = 256

    def validate(self):
        self.check(self.tokens_per_tile >= 1, "tokens_per_tile", "at least 1")
        inside = len(self.strides) >= 1 and all(1 <= stride <= self.tokens_per_tile for stride in self.strides)
        self.check(inside, "strides", f"numbers from 1 to tokens_per_tile = {self.tokens_per_tile}, at least one")

    @property
    def axes(self):
        return 1

    def grid(self, grid, start, rng):
        step = int(rng.choice(self.strides)) / self.tokens_per_tile
        places = start - 1 + step * np.arange(1, math.prod(grid) + 1)
        return places[:, None], float(math.ceil(places[-1])) + 1

    @classmethod
    def examples(cls):
        return (cls(), cls(strides=(64,)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FramePositions(VisualPositions):
    """FAR's (2025) axial positions of video: frame, row and column, each counted from its own 0; frames count through."""

    @property
    def axes(self):
        return 3

    def grid(self, grid, start, rng):
        return grid.coordinates() + np.asarray([start, 0, 0]), start + grid.frames

    @classmethod
    def examples(cls):
        return (cls(),)
