"""Copies can be read off what stands before them, as far back as asked; tiles repeat."""

import numpy as np
import pytest

from lcx.data.copying import Copies, Tiles
from lcx.data.recall import TaskDoesNotFit
from lcx.data.sources import StandardLibrary
from lcx.data.tokenizers import ByteTokenizer
from lcx.spec import SpecError

BYTES = ByteTokenizer()


def make(spec, length, i=0, **options):
    return spec.example(BYTES, length, i, **({"seed": 0, "split": "test"} | options))


@pytest.mark.parametrize("far", [0, 100, 1000])
@pytest.mark.parametrize("length", [60, 300])
def test_what_is_asked_for_was_written_before(length, far):
    spec, found = Copies(far=far, haystack=StandardLibrary(split="heldout")), []
    for i in range(20):
        ids, ((start, stop),), *_ = make(spec, length, i)
        assert len(ids) == length and stop - start == 20
        text = bytes(ids.astype(np.uint8))
        span = text[start - 4 : stop]
        assert span.isalpha() and span.islower() and text.count(span) == 2
        if far:
            assert stop == length
        found.append(start - 4 - text.index(span))
    assert min(found) >= min(far, length - 24) and (far or max(found) > min(found))


def test_depth_places_the_source():
    early, late = (bytes(make(Copies(far=50), 200, depth=depth).ids.astype(np.uint8)) for depth in (0.0, 1.0))
    assert early[:24] == early[-24:] and late[-74:-50] == late[-24:]


@pytest.mark.parametrize("length", [65, 256])
def test_tiles_repeat(length):
    periods = set()
    for i in range(20):
        ids, ((start, stop),), *_ = make(Tiles(), length, i)
        assert len(ids) == stop == length and 8 <= start <= 64
        np.testing.assert_array_equal(ids[start:], ids[:-start])
        periods.add(start)
    assert len(periods) > 5


def test_training_rows_count_every_token_where_asked():
    row = Copies(loss="all").rows(BYTES, 80, 0)[3]
    np.testing.assert_array_equal(row.weights, [1.0] * 79 + [0.0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(TaskDoesNotFit, match="length = 40: expected at least 48 tokens"):
        make(Copies(), 40)
    with pytest.raises(TaskDoesNotFit, match="length = 64: expected at least 65 tokens"):
        make(Tiles(), 64)
    with pytest.raises(SpecError, match="cue = 24: expected from 1 to span - 1 = 23"):
        Copies(cue=24)
    with pytest.raises(SpecError, match="longest = 3: expected at least shortest = 8"):
        Tiles(longest=3)
