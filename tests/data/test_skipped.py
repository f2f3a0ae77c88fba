"""Two parts of a longer text: what they hold, where they stand, what the seam predicts."""

import numpy as np
import pytest

from lcx.data.packing import PackedText
from lcx.data.skipped import Skipped
from lcx.data.sources import StandardLibrary
from lcx.data.tokenizers import ByteTokenizer
from lcx.spec import SpecError

BYTES, TEXT = ByteTokenizer(), PackedText(source=StandardLibrary(split="heldout"))


@pytest.mark.parametrize("seam", [True, False])
def test_a_row_is_two_parts_of_a_text(seam):
    texts, rows = TEXT.rows(BYTES, 200, 0), Skipped(rows_of=TEXT, target=320, seam=seam).rows(BYTES, 40, 0)
    skips, ends = set(), set()
    for i in range(60):
        row, text = rows[i], texts[i]
        steps = np.diff(row.positions[:, 0])
        (cuts,) = np.nonzero(steps != 1)
        assert row.positions[0, 0] == 0 and len(cuts) <= 1 and row.positions[-1, 0] < 320
        first = int(cuts[0]) + 1 if len(cuts) else None
        if first is not None:
            assert first <= 20
            np.testing.assert_array_equal(row.tokens[:first], text.tokens[:first])
            second = row.tokens[first:]
            places = [n for n in range(first, 201 - len(second)) if (text.tokens[n : n + len(second)] == second).all()]
            assert places
            ends.add(places[-1])
            assert row.targets[first - 1] == second[0] and row.weights[first - 1] == seam
            np.testing.assert_array_equal(row.targets[: first - 1], text.targets[: first - 1])
            skips.add(int(steps[first - 1]))
        assert (row.segments == 1).all()
    assert len(skips) > 20 and len(ends) > 20


def test_a_target_below_the_row_is_refused():
    with pytest.raises(SpecError, match="target = 32: expected at least the 40 tokens of a row"):
        Skipped(rows_of=TEXT, target=32).rows(BYTES, 40, 0)
