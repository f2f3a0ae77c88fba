"""Keys that are bound anew: what is asked for is the last value of every key."""

import numpy as np
import pytest

from lcx.data.bindings import Bindings
from lcx.data.recall import TaskDoesNotFit
from lcx.data.tokenizers import ByteTokenizer


def test_every_key_is_asked_for_its_last_value():
    task = Bindings(keys=5)
    for i in range(20):
        ids, answers, depths, _ = task.example(ByteTokenizer(), 80, i, seed=0, split="train")
        text, last, bound = bytes(ids.tolist()).decode(), {}, {}
        assert len(text) == 80 and len(answers) == 5
        for n in range(35):
            last[text[2 * n]], bound[text[2 * n]] = text[2 * n + 1], n
        assert len(last) == 5
        for (start, stop), depth in zip(answers, depths, strict=True):
            key = text[start - 1]
            assert text[start:stop] == last.pop(key) and depth == bound[key] / 35
        assert not last


def test_what_does_not_fit_is_refused():
    with pytest.raises(TaskDoesNotFit, match="length = 19: expected at least 20 tokens"):
        Bindings(keys=5).example(ByteTokenizer(), 19, 0, seed=0, split="train")
    with pytest.raises(ValueError, match="depth is not a setting"):
        Bindings().example(ByteTokenizer(), 100, 0, seed=0, split="train", depth=0.5)
    ids = Bindings(keys=5).example(ByteTokenizer(), 20, 0, seed=0, split="train").ids
    assert np.unique(ids[:10:2]).size == 5
