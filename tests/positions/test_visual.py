"""Positions of documents with images and video, by hand from the papers' rules."""

import numpy as np
import pytest

from lcx.parts import parts
from lcx.positions.visual import (
    DiagonalPositions,
    FramePositions,
    Grid,
    MRopePositions,
    Placed,
    Text,
    V2PEPositions,
    VisualPositions,
)
from lcx.spec import SpecError

RULES = [rule for cls in parts(VisualPositions) for rule in cls.examples()]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_text_alone_is_counted(rule):
    placed = rule.place([Text(3), Text(2)])
    np.testing.assert_array_equal(placed.positions, np.repeat(np.arange(5)[:, None], rule.axes, axis=1))
    np.testing.assert_array_equal(placed.extended(2), np.repeat([[5.0], [6.0]], rule.axes, axis=1))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_grid_has_its_tokens_and_text_goes_on_behind_it(rule):
    placed = rule.place([Text(4), Grid(2, 3, 2), Text(1)], np.random.default_rng(0))
    assert placed.positions.shape == (17, rule.axes)
    assert (
        len(set(placed.positions[-1])) == 1 and placed.positions[-1, 0] >= 4 and placed.following == placed.positions[-1, 0] + 1
    )
    with pytest.raises(ValueError, match="expected at least one frame, row and column"):
        rule.place([Grid(1, 0, 2)])


def test_mrope_of_an_image():
    """The published example: AB, an image of 2 rows and 3 columns between its marks, C."""
    t, h, w = MRopePositions().place([Text(2), Grid(1, 2, 3), Text(1)]).positions.T
    assert t.tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5]
    assert h.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5]
    assert w.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]


def test_mrope_of_a_long_video():
    """More frames than rows and columns: behind all axes, or behind rows and columns."""
    video = [Text(1), Grid(5, 2, 2), Text(1)]
    assert MRopePositions().place(video).positions[-1].tolist() == [6, 6, 6]
    assert MRopePositions(following="rows and columns").place(video).positions[-1].tolist() == [3, 3, 3]
    times = MRopePositions(time_step=1.5).place([Grid(4, 1, 1)]).positions[:, 0]
    assert times.tolist() == [0, 1, 3, 4]


def test_the_diagonal_is_symmetric_around_the_time_of_a_frame():
    placed = DiagonalPositions().place([Text(3), Grid(1, 3, 3), Text(1)])
    t, h, w = placed.positions[3:12].T
    assert set(t) == {3} and h.mean() == w.mean() == 3 and sorted(set(h)) == [2, 3, 4]
    assert placed.positions[-1].tolist() == [4, 4, 4]
    assert DiagonalPositions().place([Grid(1, 4, 4)]).positions.min() == -1
    slow = DiagonalPositions(gammas=(0.75,)).place([Grid(3, 1, 1), Text(1)])
    assert slow.positions[:, 0].tolist() == [0, 0.75, 1.5, 2.5]


def test_visual_tokens_of_v2pe_take_a_share_of_a_place():
    placed = V2PEPositions(strides=(64,)).place([Text(2), Grid(1, 2, 3), Text(2)])
    assert placed.positions[:, 0].tolist() == [0, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 4, 5]
    drawn = {V2PEPositions().place([Grid(1, 1, 1)], np.random.default_rng(n)).positions[0, 0] + 1 for n in range(60)}
    assert drawn == {2.0**-n for n in range(9)}
    with pytest.raises(SpecError, match=r"strides = \(300,\): expected numbers from 1 to tokens_per_tile = 256"):
        V2PEPositions(strides=(300,))


def test_frames_rows_and_columns_of_far():
    placed = FramePositions().place([Grid(2, 1, 2), Grid(1, 2, 1)])
    assert placed.positions.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1], [2, 0, 0], [2, 1, 0]]


def test_steps_that_float32_does_not_hold_are_refused():
    """Its spacing is 1/256 up to 65,536 and 1/128 from there, and 2 from 2^24."""
    rule, fine = V2PEPositions(strides=(1,)), Grid(1, 16, 16)
    up_to = rule.place([Text(65_536), fine])
    assert up_to.positions[-1, 0] == 65_536 and (up_to.positions == np.float32(up_to.positions)).all()
    message = r"Placed\.positions: 65536\.00390625 after 65536\.0 at token 65537, a step of 0\.00391 where those of float32"
    with pytest.raises(ValueError, match=message + " are 0.00781: expected smaller positions or larger steps"):
        rule.place([Text(65_537), Grid(1, 1, 2)])
    for step, start in ((1 / 256, 65_536.0), (1 / 16, 2.0**20), (0.7, 2.0**23), (1.0, 2.0**24)):
        places = start + step * np.arange(-3, 2)[:, None]
        Placed(places[:4], 5.0)
        for given in (places, -places[::-1], np.concatenate([np.zeros((5, 1)), places], axis=1)):
            with pytest.raises(ValueError, match=r"Placed\.positions: .*: expected smaller positions or larger steps"):
                Placed(given, 5.0)
    with pytest.raises(ValueError, match=r"Placed\.following: 16777217\.0 after 16777216\.0 at token 2"):
        Placed(np.zeros((1, 1)), 2.0**24)


def test_what_float64_rounds_is_no_step():
    assert 0.1 + 0.7 < 0.8
    Placed(np.asarray([[0.8], [0.1 + 0.7], [0.8]]), 2.0)
