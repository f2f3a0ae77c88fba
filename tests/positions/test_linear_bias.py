"""Slopes of the biases, and that a model with one is what the formula says."""

import numpy as np
import pytest

from lcx.positions.alibi import ALiBi
from lcx.positions.flexrope import FlexRope
from lcx.spec import SpecError


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (6, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
        (8, [2**-n for n in range(1, 9)]),
        (12, [2**-n for n in range(1, 9)] + [2 ** (-n / 2) for n in (1, 3, 5, 7)]),
    ],
)
def test_slopes_of_alibi(heads, slopes):
    """Those of six heads: transformers' BLOOM; the others by hand from the paper's rule."""
    np.testing.assert_allclose(ALiBi().slopes(heads), slopes, rtol=1e-12)
    assert ALiBi().along == "index"


def test_flexrope_falls_by_frames_alike_in_every_head():
    assert FlexRope(slope=0.25).slopes(3).tolist() == [0.25] * 3 and FlexRope(slope=0.25).along == "order"
    with pytest.raises(SpecError, match=r"slope = -1\.0: expected 0 or a positive number"):
        FlexRope(slope=-1.0)
