"""Every frequency rule gives a finite frequency and axis for each rotated pair, and a positive factor, at any length."""

import numpy as np
import pytest

from lcx.parts import parts
from lcx.positions.frequencies import FrequencyRule
from lcx.spec import SpecError

HEAD = 8
EXAMPLES = [(f"{cls.__name__}-{n}", rule) for cls in parts(FrequencyRule) for n, rule in enumerate(cls.examples())]


@pytest.mark.parametrize("rule", [rule for _, rule in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_every_pair_turns_by_a_number(rule):
    pairs = rule.rotated(HEAD) // 2
    for length in (1, 64, 1000):
        inverse = np.asarray(rule.inverse_frequencies(2 * pairs, length), np.float64)
        assert inverse.shape == (pairs,) and np.isfinite(inverse).all() and (inverse >= 0).all()
        assert 0 < rule.attention_factor(length) < np.inf
        found = rule.frequencies(HEAD, length)
        assert found.axis.shape == (pairs,) and set(found.axis) == set(range(max(1, len(rule.sections))))
        assert np.isfinite(np.asarray(found.inv_freq)).all()


def test_what_are_no_frequencies_is_refused():
    class Holes(FrequencyRule):
        def inverse_frequencies(self, rotary_dim, length):
            return np.full(rotary_dim // 2, np.nan)

    with pytest.raises(SpecError, match=r"Holes\.inverse_frequencies of 8 channels: .*: expected 4 finite numbers"):
        Holes().frequencies(HEAD, 64)
