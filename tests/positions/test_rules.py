"""Frequency rules against golden vectors of transformers 5.23 (r = 16, base 1e4, window 256, factor 4) and of the formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lcx.positions.axial import AxialRope
from lcx.positions.base_multiplier import BaseMultiplier, critical_dimension
from lcx.positions.dprope import DPRoPE, disturbance
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.dynamic_yarn import DynamicYaRN
from lcx.positions.frequencies import geometric
from lcx.positions.hope import HoPE
from lcx.positions.length_rule import LengthRule
from lcx.positions.linear import LinearInterpolation
from lcx.positions.llama3 import Llama3
from lcx.positions.longrope import LongRoPE, rescaled
from lcx.positions.mrope_plus_plus import MRopePlusPlus
from lcx.positions.ntk import NTK
from lcx.positions.power_basis import PowerBasis
from lcx.positions.proportional import Proportional
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.positions.truncated_basis import TruncatedBasis
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
    "llama3": (
        Llama3(factor=8.0, original_length=256, base=1e4),
        1,
        "1 0.31622776 0.1 0.0066131069 0.00125 0.00039528473 0.000125 3.9528473e-05",
    ),
    "proportional": (Proportional(ratio=0.5), 1, "1 0.31622776 0.1 0.031622779 0 0 0 0"),
    "power basis": (PowerBasis(), 1, "1 0.29580399 0.08660254 0.025 0.0070710678 0.0019364917 0.0005 0.0001118034"),
    "truncated basis": (
        TruncatedBasis(original_length=256),
        1,
        "1 0.31622777 0.1 0.031622777 0.0015339808 0.0015339808 0 0",
    ),
    "dynamic ntk": (
        DynamicNTK(original_length=256),
        1,
        "1 0.25941283 0.067295007 0.017457189 0.0045286184 0.0011747816 0.00030475340 7.9056947e-05",
    ),
    "dynamic ntk factor 4": (
        DynamicNTK(original_length=256, factor=4.0),
        1,
        "1 0.21921247 0.048054103 0.010534058 0.0023091969 0.00050620473 0.00011096639 2.4325213e-05",
    ),
    "longrope": (
        LongRoPE(original_length=256, short=(1.0,) * 8, long=(1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0), factor=4.0),
        1.11803399,
        "1 0.31622776 0.06666667 0.015811389 0.0033333334 0.00079056947 0.00025 7.9056947e-05",
    ),
    "dynamic yarn": (
        DynamicYaRN(original_length=256),
        1.13862944,
        "1 0.25693506 0.0625 0.013834965 0.0025 0.00079056947 0.00025 7.9056947e-05",
    ),
    "dprope": (
        DPRoPE(factor=4.0, original_length=256),
        1,
        "1 0.079056942 0.1 0.031622777 0.0025 0.00079056942 0.00025 7.9056942e-05",
    ),
}
LENGTH_RULES = [rule for rule, *_ in GOLDEN.values() if isinstance(rule, LengthRule)]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name):
    rule, factor, text = GOLDEN[name]
    given = rule.frequencies(16, 1024).at(1024)
    np.testing.assert_allclose(given.inv_freq, np.asarray(text.split(), float), rtol=2e-6)
    assert math.isclose(given.factor, factor, rel_tol=1e-8)


@pytest.mark.parametrize("rule", LENGTH_RULES, ids=lambda rule: type(rule).__name__)
def test_rules_of_the_length_are_the_trained_ones_within_the_window(rule):
    table = rule.frequencies(16, 1024)
    for length in (1, 255, 256):
        np.testing.assert_allclose(table.at(length).inv_freq, geometric(1e4, 16))
    assert (table.at(257).inv_freq[-1] < geometric(1e4, 16)[-1]) and rule.frequencies(16, 100).at(100).inv_freq[0] == 1


def test_lengths_are_rounded_up_to_steps():
    fine, coarse = (DynamicNTK(original_length=256, step=step).frequencies(16, 1000) for step in (1, 100))
    assert len(fine.inv_freq) == 745 and len(coarse.inv_freq) == 9
    for length, rounded in ((256, 256), (257, 356), (356, 356), (1000, 1056)):
        np.testing.assert_array_equal(
            coarse.at(length).inv_freq, DynamicNTK(original_length=256).frequencies(16, rounded).at(rounded).inv_freq
        )
    with pytest.raises(SpecError, match=r"original_length = 256: expected a table of at most 8,388,608 numbers, .*: set step"):
        DynamicNTK(original_length=256).frequencies(128, 1 << 20)


def test_longrope_lists_are_as_long_as_the_pairs():
    with pytest.raises(SpecError, match=r"LongRoPE\.short = .*: expected 8 factors, one a rotated pair"):
        LongRoPE(original_length=256, short=(1.0,) * 4, long=(2.0,) * 4, factor=4.0).frequencies(16, 1024)
    assert rescaled((1.0, 1.5, 4.0), 4.0, 7.0) == (1.0, 2.0, 7.0)


def test_llama_2_yarn_ramp():
    given = YaRN(factor=16.0, original_length=4096).frequencies(128, 65536)
    expected = {20: 0.056234129, 21: 0.046940859, 33: 0.0046004355, 45: 0.00015177164, 46: 8.334509e-05}
    for channel, value in expected.items():
        assert math.isclose(given.inv_freq[channel], value, rel_tol=2e-6)
    assert math.isclose(given.factor, 1.27725887, rel_tol=1e-8)


def test_llama_3_1():
    given = Llama3().frequencies(128, 1 << 17).inv_freq
    expected = {28: 0.0032114461, 29: 0.0021665706, 34: 0.00017850779, 35: 9.5562122e-05, 63: 3.0689259e-07}
    for channel, value in expected.items():
        assert math.isclose(given[channel], value, rel_tol=2e-6)


@pytest.mark.parametrize("base, length", [(1e4, 256), (5e5, 8192)])
def test_llama_3_is_yarns_ramp_by_rotations_without_a_temperature(base, length):
    yarn = YaRN(base=base, factor=8.0, original_length=length, fast=4.0, slow=1.0, ramp="rotations", temperature="none")
    given = Llama3(base=base, factor=8.0, original_length=length)
    np.testing.assert_allclose(given.frequencies(128, 0).inv_freq, yarn.frequencies(128, 0).inv_freq, rtol=1e-14)


def test_sections_in_order_are_those_of_qwen():
    """Qwen2-VL: 16 pairs of time, 24 of rows, 24 of columns. Qwen3-VL: 24, 20 and 20 by turns, time where those run out."""
    contiguous = Rope(sections=(16, 24, 24)).frequencies(128, 0).axis
    assert contiguous.tolist() == [0] * 16 + [1] * 24 + [2] * 24
    interleaved = Rope(sections=(24, 20, 20), section_order="interleaved").frequencies(128, 0).axis
    assert interleaved.tolist() == [0, 1, 2] * 20 + [0] * 4
    alternating = Rope(sections=(16, 24, 24), section_order="alternating").frequencies(128, 0).axis
    assert alternating.tolist() == [1, 2] * 24 + [0] * 16


def test_text_is_turned_by_all_sections_as_by_one_axis():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 32)), jnp.float32)
    positions = jnp.asarray([0.0, 1.0, 7.0, 1000.0, 1e6])[None, :, None]
    sections = Rope(sections=(4, 6, 6)).frequencies(32, 0)
    plain = rotate(x, positions, Rope().frequencies(32, 0))
    np.testing.assert_array_equal(rotate(x, positions, sections), plain)
    np.testing.assert_array_equal(rotate(x, jnp.tile(positions, 3), sections), plain)
    with pytest.raises(ValueError, match=r"info\.positions: 2 axes, but the rope's sections read 3"):
        rotate(x, jnp.tile(positions, 2), sections)


def test_sections_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match=r"sections = \(16, 24\): expected sizes that add up to the 64 rotated pairs"):
        Rope(sections=(16, 24)).frequencies(128, 0)
    with pytest.raises(SpecError, match=r"sections = .*: expected at most 3 interleaved pairs for axis 1"):
        Rope(sections=(3, 4, 1), section_order="interleaved").frequencies(16, 0)


def test_hope_stands_still_in_time():
    given, theta = HoPE().frequencies(128, 0), geometric(1e4, 128)
    np.testing.assert_array_equal(given.inv_freq, [*theta[:48], *[0.0] * 16])
    assert given.axis.tolist() == [1, 2] * 24 + [0] * 16


def test_far_has_a_ladder_for_each_axis():
    given = AxialRope().frequencies(64, 0)
    ladders = [1e4 ** -(np.arange(0, size, 2) / size) for size in (16, 24, 24)]
    np.testing.assert_allclose(given.inv_freq, np.concatenate(ladders), rtol=1e-14)
    assert given.axis.tolist() == [0] * 8 + [1] * 12 + [2] * 12 and given.pairing == "interleaved"


def test_mrope_plus_plus():
    """The paper's form at the size of Qwen2-VL, as parts of RoPE's frequencies; the code's is NTK beyond time."""
    shared = {"factor": 4.0, "original_length": 16_384}
    theta = geometric(1e4, 128)
    ratio = MRopePlusPlus(**shared).frequencies(128, 0).inv_freq / theta
    expected = {15: 1, 16: 1, 20: 0.66103704, 30: 0.32878854, 39: 0.25379085, 40: 0.25, 63: 0.25}
    np.testing.assert_allclose(ratio[list(expected)], list(expected.values()), rtol=2e-6)
    code, ntk = MRopePlusPlus(**shared, form="code"), NTK(factor=65_535 / 16_383)
    found = code.frequencies(128, 0).inv_freq
    np.testing.assert_allclose(found, [*theta[:16], *ntk.frequencies(128, 0).inv_freq[16:]], rtol=1e-14)


def test_llama_3_without_a_ramp_keeps_the_channels_of_a_turn():
    theta = geometric(1e4, 16)
    given = Llama3(base=1e4, factor=8.0, original_length=256, low=1.0, high=1.0).frequencies(16, 0).inv_freq
    np.testing.assert_allclose(given, np.where(256 * theta / (2 * np.pi) >= 1, theta, theta / 8))


@pytest.mark.parametrize(
    "base, trained, expected",
    [(5e5, 4096, {8192: 4, 16384: 14, 24576: 31, 32768: 55}), (5e5, 8192, {16384: 4, 32768: 13}), (1e6, 2048, {4096: 5})],
    ids=["LLaDA", "Llama 3", "Dream"],
)
def test_longllada_multipliers(base, trained, expected):
    """Of 128 channels, as the paper's configs have them."""
    for target, multiplier in expected.items():
        rule = BaseMultiplier(multiplier="auto", base=base, original_length=trained, target_length=target)
        assert rule.resolved(128) == multiplier
        np.testing.assert_allclose(rule.frequencies(128, 0).inv_freq, geometric(base * multiplier, 128))
    assert critical_dimension(rule, 128) == {(5e5, 4096): 64, (5e5, 8192): 70, (1e6, 2048): 54}[base, trained]


def test_dprope_disturbances():
    """Of extrapolation and interpolation, r = 16, window 256, factor 4: float64 arithmetic of the formulas."""
    theta = geometric(1e4, 16)
    for new, text in (
        (theta, "2.9276 3.2436 2.8007 3.2357 5.8773 9.5024 10.3258 10.9556"),
        (theta / 4, "3.1082 1.9006 3.3557 3.4120 0.040501 0.0040156 0.00039192 2.64e-05"),
    ):
        np.testing.assert_allclose(disturbance(tuple(new), tuple(theta), 256, 1024), np.asarray(text.split(), float), rtol=2e-3)


@pytest.mark.parametrize(
    "factor, paper, chosen, mean", [(2.0, 40, 46, (0.033, 0.191, 1.586)), (4.0, 32, 42, (0.132, 0.210, 2.146))]
)
def test_dprope_at_the_size_of_llama_2(factor, paper, chosen, mean):
    """Pairs that are interpolated of 64, without a threshold and by the paper's number; its mean is the least disturbed."""
    theta = geometric(1e4, 128)
    rule = DPRoPE(factor=factor, original_length=4096)
    given = rule.frequencies(128, 0).inv_freq
    assert (given < theta).sum() == chosen
    measured = [
        disturbance(tuple(new), tuple(theta), 4096, int(factor * 4096)).mean() for new in (given, theta / factor, theta)
    ]
    np.testing.assert_allclose(measured, mean, atol=6e-4)
    by_number = DPRoPE(factor=factor, original_length=4096, interpolated=paper).frequencies(128, 0).inv_freq
    assert (by_number < theta).sum() == paper and (given[by_number < theta] < theta[by_number < theta]).all()


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
