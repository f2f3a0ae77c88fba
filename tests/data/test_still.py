"""What is asked of a still picture is what its cell showed before, and the picture is the same however long the video."""

import dataclasses

import numpy as np
import pytest

from lcx.data.recall import TaskDoesNotFit
from lcx.data.still import Still
from lcx.data.tokenizers import ByteTokenizer
from lcx.positions.visual import MRopePositions
from lcx.spec import SpecError

BYTES = ByteTokenizer()


def make(spec, length, i=0):
    return spec.example(BYTES, length, i, seed=0, split="test")


def video(spec, length, i=0):
    example = make(spec, length, i)
    return example, example.ids.reshape(-1, spec.height, spec.width)


def test_answers_are_cells_that_were_shown():
    spec, hits = Still(height=3, width=4), []
    for i in range(50):
        example, frames = video(spec, 100, i)
        assert len(frames) == 8 and len(example.ids) == 96
        asked = [divmod(start - 84, 4) for start, _ in example.answers]
        assert all(stop == start + 1 for start, stop in example.answers) and all(column for _, column in asked)
        hits += [(frames[:-1, *cell] == frames[-1, *cell]).mean() for cell in asked]
        for (start, _), depth in zip(example.answers, example.depths, strict=True):
            cell = divmod(start - 84, 4)
            assert (frames[: round(depth * 6) + 1, *cell] == frames[-1, *cell]).any()
    assert min(hits) > 0 and np.mean(hits) == pytest.approx(0.5 + 0.5 / 36, abs=0.02)


def test_all_is_shown_where_nothing_flickers():
    example, frames = video(Still(height=2, width=3, shown=1.0), 30)
    assert (frames == frames[-1]).all() and len(example.answers) == 4 and set(example.depths) == {0.0}


def test_every_rule_places_the_same_video():
    plain = Still(height=2, width=2)
    placed = dataclasses.replace(plain, positions=MRopePositions())
    mine, theirs = make(plain, 21, 3), make(placed, 21, 3)
    assert (mine.ids == theirs.ids).all() and mine.answers == theirs.answers and mine.placed is None
    assert theirs.placed.positions.shape == (20, 3) and (placed.position_axes, plain.position_axes) == (3, None)
    assert placed.spread(21) == 21


def test_what_does_not_fit_is_refused():
    with pytest.raises(TaskDoesNotFit, match="length = 17: expected at least 18 tokens"):
        make(Still(height=3, width=3), 17)
    for options, said in (({"shown": 0.0}, "Still.shown = 0.0"), ({"width": 1}, "Still.width = 1")):
        with pytest.raises(SpecError, match=said):
            Still(**options)
    with pytest.raises(ValueError, match="depth is not a setting"):
        Still().example(BYTES, 64, 0, seed=0, split="test", depth=0.5)
