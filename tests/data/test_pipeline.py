"""The order of rows is a pure function of seed and step: on any host count, after any resume."""

import numpy as np
import pytest

from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles, Records
from lcx.data.sources import TextFolder
from lcx.spec import SpecError


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


def test_impossible_pipelines_are_refused(pipeline):
    with pytest.raises(ValueError, match="host 0 of 3 cannot take its share of batch_size = 8"):
        pipeline.dataset(hosts=3)
    with pytest.raises(SpecError, match=r"Weighted\.weight = 0"):
        Weighted(rows=Needles(), weight=0.0)
    with pytest.raises(SpecError, match=r"mixture"):
        Pipeline(mixture=(), length=8, batch_size=1)
