"""What is asked of a video can be read off it in one step from a symbol that stands there once."""

import dataclasses

import numpy as np
import pytest

from lcx.data.continuous import Continuous
from lcx.data.frames import MARKS, STEPS, SYMBOLS, Frames
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles, TaskDoesNotFit
from lcx.data.rows import Joined
from lcx.data.skipped import Skipped
from lcx.data.tokenizers import ByteTokenizer
from lcx.positions.visual import DiagonalPositions, Grid, MRopePositions, Text, V2PEPositions
from lcx.spec import SpecError

BYTES = ByteTokenizer()


def make(spec, length, i=0, **options):
    return spec.example(BYTES, length, i, **({"seed": 0, "split": "test"} | options))


@pytest.mark.parametrize("height, width, asked", [(2, 2, 1), (4, 4, 8), (3, 5, 2)])
@pytest.mark.parametrize("frames", [None, (2, 4)])
@pytest.mark.parametrize("steps", [("next",), tuple(STEPS)])
def test_answers_stand_one_step_from_a_symbol_that_is_there_once(height, width, asked, frames, steps):
    spec, counts = Frames(height=height, width=width, asked=asked, frames=frames, steps=steps), set()
    kinds, questions = {mark: step for step, mark in MARKS.items()}, asked * len(steps)
    for i in range(20):
        example = make(spec, 170, i)
        text = bytes(example.ids.astype(np.uint8)).decode()
        video = np.array(list(text[: -3 * questions])).reshape(-1, height, width)
        counts.add(len(video))
        assert set(video.ravel()) <= set(SYMBOLS) and len(example.answers) == questions
        seen = set()
        for start, stop in example.answers:
            mark, symbol, answer = text[start - 2 : stop]
            (place,) = np.argwhere(video == symbol)
            assert video[tuple(place + STEPS[kinds[mark]])] == answer
            seen.add((mark, symbol))
        assert len(seen) == questions
    assert counts == ({(170 - 3 * questions) // (height * width)} if frames is None else {2, 3, 4})


def test_depth_places_the_first_source():
    spec = Frames(steps=("right",))
    for depth, frame in ((0.0, 0), (0.5, 4), (1.0, 8)):
        example = make(spec, 184, depth=depth)
        assert np.flatnonzero(example.ids[:160] == example.ids[161])[0] // 16 == frame and example.depths[0] == frame / 8


def test_every_rule_places_the_same_video():
    plain = Frames(height=3, width=2, asked=2, frames=(2, 8))
    assert plain.position_axes is None and make(plain, 60).placed is None
    for rule, axes in ((MRopePositions(), 3), (V2PEPositions(strides=(64,)), 1), (DiagonalPositions(gammas=(0.5, 1.5)), 3)):
        spec = dataclasses.replace(plain, positions=rule)
        for i in range(4):
            mine, theirs = make(spec, 60, i), make(plain, 60, i)
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            assert mine.answers == theirs.answers and mine.placed.positions.shape == (len(mine.ids), axes)
    grid = Grid((len(mine.ids) - 18) // 6, 3, 2)
    expected = [DiagonalPositions(gammas=(gamma,)).place((grid, Text(18))).positions for gamma in (0.5, 1.5)]
    assert any(np.array_equal(mine.placed.positions, positions) for positions in expected)


def test_batches_carry_the_positions_and_text_stands_on_every_axis():
    video = Frames(height=2, width=2, asked=1, steps=("next",), positions=MRopePositions())
    mixture = (Weighted(rows=Joined(rows_of=video, parts=2)), Weighted(rows=Needles()))
    pipeline = Pipeline(mixture=mixture, length=64, batch_size=8)
    batch = next(iter(pipeline.dataset()))
    assert batch.info.positions.shape == (8, 64, 3)
    is_text = batch.info.segments.max(axis=1) == 1
    assert 0 < is_text.sum() < 8
    text, films = batch.info.positions[is_text], batch.info.positions[~is_text]
    np.testing.assert_array_equal(text, np.repeat(batch.info.index[is_text][..., None], 3, axis=2))
    whole = video.positions.place((Grid(7, 2, 2), Text(3))).positions  # 31 of 32 tokens, twice
    for row in films:
        np.testing.assert_array_equal(row[:31], whole)
        np.testing.assert_array_equal(row[32:63], whole)


def test_wrong_settings_are_refused():
    with pytest.raises(TaskDoesNotFit, match="expected at least 104 tokens"):
        make(Frames(), 103)
    for options, field in (
        ({"asked": 19}, "asked"),
        ({"asked": 10, "frames": (2, 4)}, "asked"),
        ({"frames": (1, 4)}, "frames"),
        ({"steps": ()}, "steps"),
    ):
        with pytest.raises(SpecError, match=rf"Frames.{field} = "):
            Frames(**options)
    anchored = Joined(rows_of=Continuous(rows_of=Needles(), sees="anchor"), parts=2)
    with pytest.raises(SpecError, match=r"rows_of = .*: expected rows without a token that all documents see"):
        anchored.check_fit(BYTES, 512)
    assert Frames().spread(128) == 128 and Frames(asked=1, positions=MRopePositions(time_step=50.0)).spread(128) > 300
    video = Frames(positions=MRopePositions())
    for rows in (Continuous(rows_of=video), Skipped(rows_of=video, target=4096)):
        with pytest.raises(SpecError, match=r"rows_of = .*: expected rows whose positions are the index"):
            rows.check_fit(BYTES, 512)
