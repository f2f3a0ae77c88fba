"""Position rules give the positions of the authors' code when both are handed the same draws."""

import math
from pathlib import Path

import numpy as np
import pytest
import text_positions as authors

from lcx.positions.position_rule import ChunkSlots, PoSE, RandomPositions, RandomSteps


@pytest.fixture(scope="module")
def held():
    with np.load(Path(__file__).parent / "golden" / "text_positions.npz") as found:
        return dict(found)


class Given(np.random.Generator):
    """Hands out what it is given: `shares` of a range, or `drawn` values as they are."""

    def __init__(self, shares=(), drawn=None):
        super().__init__(np.random.PCG64())
        self.shares, self.drawn = list(shares), drawn

    def integers(self, low, high, size=None, endpoint=False):
        if self.drawn is not None:
            return self.drawn
        take = lambda: low + math.floor(self.shares.pop(0) * (high - low + endpoint))
        return take() if size is None else np.asarray([take() for _ in range(size)])

    def uniform(self, low, high, size):
        return low + (high - low) * np.asarray(self.shares)

    def choice(self, count, size, replace):
        return self.drawn


@pytest.mark.parametrize("length", authors.LENGTHS)
def test_pose(held, length):
    found = [PoSE(target=authors.TARGET).positions(length, Given(shares)) for shares in held["pose/shares"]]
    np.testing.assert_array_equal(found, held[f"pose/{length}"])


def test_random_positions(held):
    found = [RandomPositions(target=authors.TARGET).positions(16, Given(drawn=drawn)) for drawn in held["random/drawn"]]
    np.testing.assert_array_equal(found, held["random"])


def test_random_steps(held):
    found = [RandomSteps().positions(20, Given(shares)) for shares in held["steps/shares"]]
    np.testing.assert_allclose(found, held["steps"], rtol=1e-7)


def test_slots(held):
    """The code chooses among starts that cover a slot, ours among all: its starts give its positions."""
    rule = ChunkSlots(target=authors.SLOTS, chunks=authors.CHUNKS, tail=authors.TAIL)
    slot = (authors.SLOTS - authors.TAIL) // authors.CHUNKS
    assert (held["slots/separators"] == slot * np.arange(1, authors.CHUNKS + 1) - 1).all()
    for expected in held["slots"]:
        starts = expected[:, 0] - slot * np.arange(authors.CHUNKS)
        found = rule.positions(authors.CHUNKS * authors.CHUNK + authors.TAIL, Given(drawn=starts))
        np.testing.assert_array_equal(found[: -authors.TAIL], expected.ravel())
