"""Frequency rules against golden vectors of transformers 5.23 (r = 16, base 1e4, window 256, factor 4) and of the formulas."""

import math

import numpy as np
import pytest

from lcx.positions.linear import LinearInterpolation
from lcx.positions.ntk import NTK
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError

GOLDEN = {
    "default": (Rope(), 1, "1 0.31622777 0.1 0.031622777 0.01 0.0031622777 0.001 0.00031622777"),
    "linear": (
        LinearInterpolation(factor=4.0),
        1,
        "0.25 0.079056941 0.025 0.0079056947 0.0025 0.00079056947 0.00025 7.9056947e-05",
    ),
    "linear partial": (LinearInterpolation(factor=4.0, rotary=0.5), 1, "0.25 0.025 0.0025 0.00025"),
    "ntk": (
        NTK(factor=4.0),
        1,
        "1 0.25941283 0.067295007 0.017457189 0.0045286184 0.0011747816 0.00030475340 7.9056947e-05",
    ),
    "yarn index": (
        YaRN(factor=4.0, original_length=256),
        1.13862944,
        "1 0.25693506 0.0625 0.013834965 0.0025 0.00079056947 0.00025 7.9056947e-05",
    ),
    "yarn untruncated": (
        YaRN(factor=4.0, original_length=256, truncate=False),
        1.13862944,
        "1 0.25397229 0.055398636 0.009639943 0.0025 0.00079056947 0.00025 7.9056947e-05",
    ),
    "yarn rotations": (
        YaRN(factor=4.0, original_length=256, ramp="rotations"),
        1.13862944,
        "1 0.16997965 0.032437984 0.0081263608 0.0025 0.00079056942 0.00025 7.9056942e-05",
    ),
    "yarn harmonic": (
        YaRN(factor=4.0, original_length=256, ramp="harmonic"),
        1.13862944,
        "1 0.18070158 0.04 0.0097300851 0.0025 0.00079056942 0.00025 7.9056942e-05",
    ),
    "yarn mscale": (
        YaRN(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.707),
        1.08572640,
        "1 0.31622776 0.1 0.023914725 0.0051249997 0.00084986218 2.4999999e-05 7.9056945e-06",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name):
    rule, factor, text = GOLDEN[name]
    given = rule.frequencies(16, 1024)
    np.testing.assert_allclose(given.inv_freq, np.asarray(text.split(), float), rtol=2e-6)
    assert math.isclose(given.factor, factor, rel_tol=1e-8)


def test_llama_2_yarn_ramp():
    given = YaRN(factor=16.0, original_length=4096).frequencies(128, 65536)
    expected = {20: 0.056234129, 21: 0.046940859, 33: 0.0046004355, 45: 0.00015177164, 46: 8.334509e-05}
    for channel, value in expected.items():
        assert math.isclose(given.inv_freq[channel], value, rel_tol=2e-6)
    assert math.isclose(given.factor, 1.27725887, rel_tol=1e-8)


@pytest.mark.parametrize("rule", [LinearInterpolation, NTK])
def test_factor_below_one_is_refused(rule):
    with pytest.raises(SpecError, match=r"factor = 0\.5: expected at least 1"):
        rule(factor=0.5)


def test_odd_rotary_channels_are_refused():
    with pytest.raises(SpecError, match="rotary"):
        Rope().frequencies(7, 16)
    with pytest.raises(SpecError, match="rotary"):
        NTK(factor=2.0).frequencies(2, 16)


@pytest.mark.parametrize(
    "wrong",
    [{"fast": 1.0}, {"truncate": False, "ramp": "rotations"}, {"mscale": 1.0}, {"original_length": 0}],
)
def test_impossible_yarn_is_refused(wrong):
    with pytest.raises(SpecError, match=next(iter(wrong))):
        YaRN(**({"factor": 2.0, "original_length": 128} | wrong))


def test_yarn_refuses_a_window_in_which_no_channel_turns():
    with pytest.raises(SpecError, match=r"YaRN.original_length = 2: expected at least the 6.28 tokens"):
        YaRN(factor=8.0, original_length=2).frequencies(32, 16)
