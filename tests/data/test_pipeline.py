"""The order of rows is a pure function of seed and step: on any host count, after any resume."""

import time

import numpy as np
import pytest

from lcx.data.packing import BestFit, PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles, Records
from lcx.data.rows import Joined
from lcx.data.sources import StandardLibrary, TextFolder
from lcx.spec import SpecError, edit


@pytest.fixture
def pipeline(tmp_path):
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(f"{n}" * (30 + 7 * n))
    text = PackedText(source=TextFolder(path=str(tmp_path)))
    mixture = (Weighted(rows=text, weight=2.0), Weighted(rows=Needles()), Weighted(rows=Records()))
    return Pipeline(mixture=mixture, length=40, batch_size=8, seed=1)


def read(pipeline, steps, **hosts):
    batches = iter(pipeline.dataset(**hosts))
    return [next(batches).tokens for _ in range(steps)]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_only_pick_rows(pipeline, hosts):
    dealt = [read(pipeline, 5, host=host, hosts=hosts) for host in range(hosts)]
    for step, whole in enumerate(read(pipeline, 5)):
        assert np.array_equal(whole, np.concatenate([share[step] for share in dealt]))


def test_resume_goes_on_where_it_was(pipeline):
    batches = iter(pipeline.dataset())
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    expected = [next(batches).tokens for _ in range(4)]
    again = iter(pipeline.dataset())
    again.set_state(state)
    assert all(np.array_equal(a, next(again).tokens) for a in expected)


def test_resume_on_another_host_count_goes_on_with_the_same_global_batches(pipeline):
    whole = read(pipeline, 6)
    half = iter(pipeline.dataset(host=1, hosts=2))
    for _ in range(3):
        next(half)
    quarters = [iter(pipeline.dataset(host=host, hosts=4)) for host in range(4)]
    for quarter in quarters:
        quarter.set_state(half.get_state())
    for step in (3, 4, 5):
        assert np.array_equal(whole[step], np.concatenate([next(quarter).tokens for quarter in quarters]))


def test_seed_and_nothing_else_sets_the_order(pipeline):
    again, other = read(edit(pipeline, "seed", 1), 2), read(edit(pipeline, "seed", 2), 2)
    first = read(pipeline, 2)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_standard_library_starts_within_two_seconds():
    text = PackedText(source=StandardLibrary(split="train"), packing=BestFit())
    start = time.process_time()
    batch = next(iter(Pipeline(mixture=(Weighted(rows=text),), length=512, batch_size=4).dataset()))
    assert time.process_time() - start < 2
    assert batch.shape == (4, 512)


def test_mixture_keeps_its_shares(pipeline):
    tokens = np.concatenate(read(pipeline, 10))
    needles = sum(b"Key" in bytes(np.minimum(row, 255).astype(np.uint8)) for row in tokens)
    assert needles == 20  # 80 rows, weight 1 of 4


def test_epochs_are_shuffled_anew(pipeline):
    text = Pipeline(mixture=pipeline.mixture[:1], length=40, batch_size=1, seed=1)
    rows = len(text.row_sets()[0])
    seen = [row.tobytes() for row in read(text, 2 * rows)]
    assert sorted(seen[:rows]) == sorted(seen[rows:])
    assert seen[:rows] != seen[rows:]


def test_tokens_of_recall_are_counted_in_a_sample():
    counts = Pipeline(mixture=(Weighted(rows=Records()), Weighted(rows=Needles())), length=128, batch_size=2).counts()
    assert (counts["mixture[0].rows_sampled"], counts["mixture[0].tokens_padded"]) == (16, 16 * 8)
    assert counts["mixture[0].tokens"] == 16 * 120
    assert (counts["mixture[1].tokens"], counts["mixture[1].tokens_padded"]) == (16 * 128, 0)
    assert counts["mixture[1].tokens_dropped"] == counts["mixture[1].tokens_split"] == 0


def test_short_rows_that_fill_no_whole_row_are_dropped(pipeline):
    """225 tokens make 12 rows of 20, of which the last two with their 5 tokens, and 2 x 20 - 5 of padding, fall off."""
    joined = Joined(rows_of=pipeline.mixture[0].rows, parts=5)
    counts = Pipeline(mixture=(Weighted(rows=joined),), length=100, batch_size=1).counts()
    assert (counts["mixture[0].tokens"], counts["mixture[0].rows_left_over"]) == (225, 2)
    assert (counts["mixture[0].tokens_dropped"], counts["mixture[0].tokens_padded"]) == (25, 0)
    recall = Pipeline(mixture=(Weighted(rows=Joined(rows_of=Records(), parts=5)),), length=100, batch_size=1).counts()
    assert recall["mixture[0].tokens_dropped"] == 0 and recall["mixture[0].rows_left_over"] == 4


def test_impossible_pipelines_are_refused(pipeline):
    with pytest.raises(ValueError, match="host 0 of 3 cannot take its share of batch_size = 8"):
        pipeline.dataset(hosts=3)
    with pytest.raises(ValueError, match="host 0 of 0"):
        pipeline.dataset(hosts=0)
    with pytest.raises(ValueError, match="host 2 of 2"):
        pipeline.dataset(host=2, hosts=2)
    with pytest.raises(SpecError, match=r"Weighted\.weight = 0"):
        Weighted(rows=Needles(), weight=0.0)
    with pytest.raises(SpecError, match=r"mixture"):
        Pipeline(mixture=(), length=8, batch_size=1)


def test_text_that_fills_no_row_is_refused(pipeline):
    text = pipeline.mixture[0].rows
    short = Pipeline(mixture=(Weighted(rows=Joined(rows_of=text, parts=40)),), length=1600, batch_size=1)
    with pytest.raises(SpecError, match=r"Pipeline\.mixture\[0\]\.rows = .*enough text for one row of length = 1600"):
        short.dataset()
