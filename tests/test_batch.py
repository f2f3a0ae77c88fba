"""causal_info against indices counted by hand."""

import jaxtyping
import numpy as np
import pytest

from lcx.batch import causal_info, document_index


def test_index_restarts_in_every_document():
    info = causal_info(np.asarray([[0, 0, 1, 1, 1, 2, 2, 0], [3, 4, 4, 4, 4, 4, 4, 4]]))
    assert info.index.tolist() == [[0, 0, 0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert np.array_equal(info.order, info.index)
    assert np.array_equal(info.positions[..., 0], info.index)


def test_start_continues_a_prompt():
    segments = np.asarray([[0, 1, 1, 0], [1, 1, 2, 2], [0, 0, 0, 0]])
    info = causal_info(segments, start=np.asarray([7, 2, 5]))
    assert info.index.tolist() == [[0, 7, 8, 0], [2, 3, 0, 1], [0, 0, 0, 0]]


def test_a_document_goes_on_behind_padding_and_other_segments():
    segments = np.asarray([[1, 1, 0, 1, 2, 1, -1, 2], [0, 3, 3, 0, 0, 3, -2, -1]])
    counted = [[0, 1, 0, 2, 0, 3, 0, 1], [0, 0, 1, 0, 0, 2, 0, 0]]
    assert causal_info(segments).index.tolist() == counted
    assert document_index(segments).tolist() == counted
    started = causal_info(segments, start=np.asarray([5, 9])).index.tolist()
    assert started == [[5, 6, 0, 7, 0, 8, 0, 1], [0, 9, 10, 0, 0, 11, 0, 0]]


def test_a_single_row_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"causal_info: segments \(4,\) int32: expected integers \[rows, tokens\]"):
        causal_info(np.ones(4, np.int32))


def test_segments_that_mean_nothing_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="causal_info: segment -5: expected documents from 1, 0, -1 or -2"):
        causal_info(np.array([[-5, 1]]))
    with pytest.raises(ValueError, match="float32: expected integers"):
        causal_info(np.array([[1.5, 1]], np.float32))
