"""The search gains on what it began with, keeps its lists in order, and is the same for the same seed."""

import itertools

import numpy as np
import pytest

from lcx.positions.longrope_search import search
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN

TARGET = np.asarray([1.0, 1.2, 1.2, 2.0, 3.1, 4.0, 4.4, 4.9])
HARMONIC = YaRN(factor=4.0, original_length=256, ramp="harmonic")
START = tuple(map(float, Rope().inverse_frequencies(16, 0) / HARMONIC.inverse_frequencies(16, 0)))
SMALL = {"most": 5.0, "population": 12, "iterations": 25, "parents": 6, "mutants": 6, "crossings": 6}


def test_lists_never_fall_and_losses_neither_rise():
    asked = []

    def loss(factors):
        asked.append(factors)
        return float(np.square(np.asarray(factors) - TARGET).sum())

    found = search(loss, START, **SMALL)
    assert len(asked) == len(set(asked))
    for factors in asked:
        assert factors[0] >= 1 and factors[-1] <= 5 and all(b >= a for a, b in itertools.pairwise(factors))
        np.testing.assert_allclose(np.asarray(factors) * 100, np.rint(np.asarray(factors) * 100), atol=1e-9)
    assert all(b <= a for a, b in zip(found.history, found.history[1:], strict=False))
    assert found.loss == loss(found.factors) < 0.1 * found.history[0]
    assert search(loss, START, **SMALL) == found != search(loss, START, **SMALL, seed=1)


def test_a_list_that_falls_is_refused():
    with pytest.raises(ValueError, match=r"expected factors that never fall, from 1 to most = 5\.0"):
        search(lambda _: 0.0, (1.0, 3.0, 2.0), most=5.0)
    with pytest.raises(ValueError, match="9 parents of 4"):
        search(lambda _: 0.0, (1.0, 3.0), most=5.0, population=4, parents=9)
