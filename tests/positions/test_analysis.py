"""Reach of frequency rules, angles and distances by hand, the disturbance that DPRoPE publishes, and pictures."""

import numpy as np
import pytest

from lcx.positions.analysis import angles, distances, disturbances, plot, reach
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.dprope import DPRoPE
from lcx.positions.linear import LinearInterpolation
from lcx.positions.llama3 import Llama3
from lcx.positions.long_heads import LongHeads
from lcx.positions.ntk import NTK
from lcx.positions.proportional import Proportional
from lcx.positions.rope import Rope
from lcx.positions.self_extend import SelfExtend
from lcx.positions.yarn import YaRN


def test_reach_by_hand():
    """Eight pairs of wavelengths 6.28 to 19,869; four of them turn within 256 tokens."""
    plain = reach(Rope(), 16, 256)
    assert (plain.trained, plain.turning, plain.critical_dimension, plain.effective, plain.scale) == (256, 4, 8, 256, 1)
    yarn = reach(YaRN(factor=4.0, original_length=256), 16, 1024)
    assert yarn.effective == 1024 and yarn.scale == pytest.approx(1.13862944**2)
    assert reach(LinearInterpolation(factor=4.0), 16, 256).effective == 1024
    assert reach(Llama3(factor=8.0, original_length=256, base=1e4), 16, 2048).effective == 2048


def test_ntk_reaches_less_than_its_factor():
    """Its slowest pair is slowed by the factor, the first that does not turn by less: 4 ** (2 * 4 / 14)."""
    assert reach(NTK(factor=4.0), 16, 256).effective == int(256 * 4 ** (8 / 14))


def test_pairs_that_stand_still_reach_everywhere():
    assert reach(Proportional(ratio=0.5), 16, 256).effective is None


def test_training_with_skipped_positions_reaches_what_it_showed():
    """A YaRN of 4 times the 256 tokens, trained at distances to 4,096; and at fewer than it reaches anyway."""
    yarn = YaRN(factor=4.0, original_length=256)
    assert [reach(yarn, 16, 256, spread=n).effective for n in (None, 512, 4096)] == [1024, 1024, 4096]
    assert reach(Rope(), 16, 256, spread=1024).effective == 1024


def test_disturbances_are_the_published_ones():
    """Mean over pairs at Llama 2's size: DPRoPE below interpolation below extrapolation (8k: 0.033, 0.191, 1.586)."""
    means = [
        disturbances(rule, 128, 4096, 8192).mean()
        for rule in (DPRoPE(factor=2.0, original_length=4096), LinearInterpolation(factor=2.0), Rope())
    ]
    np.testing.assert_allclose(means, [0.033, 0.191, 1.586], atol=6e-4)


def test_angles_by_hand():
    """One radian a token: 0, 1 and 2, 3 of the first two quarters of a turn; of eight tokens 4, then 5 and 6, then 7 again."""
    before, found = angles(Rope(), 2, 4, 8, bins=4)
    np.testing.assert_allclose(before, [[0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(found, [[3 / 8, 2 / 8, 1 / 8, 2 / 8]])


def test_distances_by_hand():
    """Of the last of 24 tokens: groups of 4 behind 8 tokens, and pairs that keep theirs beside them."""
    near, grouped = [7, 6, 5, 4, 3, 2, 1, 0], [n for n in (11, 10, 9, 8) for _ in range(4)]
    assert distances(SelfExtend(group=4, window=8), 4, 24)[:, 0].tolist() == grouped + near
    found = distances(DimensionGroups(groups=(1, 4), window=8), 4, 24)
    np.testing.assert_array_equal(found.T, [[*range(23, -1, -1)], grouped + near])


def test_a_picture(tmp_path):
    parts = {"none": Rope(), "YaRN": YaRN(factor=4.0, original_length=256), "still": Proportional(ratio=0.5)}
    parts |= {"grouped": SelfExtend(group=8, window=128), "by pairs": DimensionGroups(groups=(1, 8), window=128)}
    plot(parts, 16, 256, 1024, tmp_path / "positions.png", angles_of=(5,))
    assert (tmp_path / "positions.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"plot: chosen = LongHeads\(.*: expected a frequency rule or a plan of regions"):
        plot({"chosen": LongHeads()}, 16, 256, 1024, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"plot: angles_of = 8: expected pairs of channels below 8"):
        plot(parts, 16, 256, 1024, tmp_path / "none.png", angles_of=(8,))
