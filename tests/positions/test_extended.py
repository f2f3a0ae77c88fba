"""A rule for a longer window keeps what the old one was trained with, and turns its slow channels no further."""

import numpy as np
import pytest

from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.extended import extended
from lcx.positions.linear import LinearInterpolation
from lcx.positions.llama3 import Llama3
from lcx.positions.longrope import LongRoPE
from lcx.positions.proportional import Proportional
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError, edits

LLAMA, QWEN = Llama3(), YaRN(factor=4.0, original_length=32768, base=1e6, temperature="none")


def test_a_plain_rope_becomes_yarn_with_all_that_it_says():
    rule, window = extended(Rope(base=5e5, rotary=0.5, pairing="interleaved", sections=(2, 6)), 8192, 4.0)
    assert window == 32768
    assert rule == YaRN(factor=4.0, original_length=8192, base=5e5, rotary=0.5, pairing="interleaved", sections=(2, 6))


@pytest.mark.parametrize(
    ("rule", "window", "longer"),
    [
        (LLAMA, 131_072, 524_288),
        (QWEN, 131_072, 524_288),  # config.json may say either of its windows
        (QWEN, 32_768, 524_288),
        (LinearInterpolation(factor=4.0), 8192, 32_768),
    ],
)
def test_a_factor_that_is_there_is_multiplied(rule, window, longer):
    found, length = extended(rule, window, 4.0)
    assert (found, length) == (edits(rule, [("factor", 4 * rule.factor)]), longer)
    slowest = [one.inverse_frequencies(128, 0)[-1] for one in (rule, found)]
    np.testing.assert_allclose(slowest[0], 4 * slowest[1])


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (DynamicNTK(original_length=64), "rope = DynamicNTK: no factor extends it: expected Rope, YaRN"),
        (LongRoPE(original_length=64, short=(1.0,), long=(2.0,), factor=2.0), "rope = LongRoPE: no factor"),
        (Proportional(ratio=0.5), "rope = Proportional: no factor"),
        (YaRN(factor=4.0, original_length=64, temperature=1.2), r"YaRN.temperature = 1.2: expected 'yarn' or 'none'"),
    ],
)
def test_a_rule_that_no_factor_extends_is_refused(rule, line):
    with pytest.raises(SpecError, match=line):
        extended(rule, 64, 2.0)
