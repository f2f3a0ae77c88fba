"""Keys that are bound anew: what is asked for is the value that a key is bound to at that place."""

import pytest

from lcx.data.bindings import Bindings
from lcx.data.recall import TaskDoesNotFit
from lcx.data.tokenizers import ByteTokenizer
from lcx.spec import SpecError


@pytest.mark.parametrize("asked", [0.0, 0.5])
def test_a_key_is_asked_for_the_value_it_is_bound_to(asked):
    task = Bindings(keys=5, asked=asked)
    for i in range(20):
        ids, answers, depths, _ = task.example(ByteTokenizer(), 80, i, seed=0, split="train")
        text, now, expected = bytes(ids.tolist()).decode(), {}, []
        assert len(text) == 80
        for n in range(40):
            key, value = text[2 * n : 2 * n + 2]
            if key.islower():
                now[key] = (value, n)
            else:
                assert now[key.lower()][0] == value
                expected.append(((2 * n + 1, 2 * n + 2), now[key.lower()][1] / 35))
        assert list(zip(answers, depths, strict=True)) == expected
        assert len({text[2 * n] for n in range(35, 40)}) == 5 == len(now) and text[70::2].isupper()
        assert len(answers) == 5 if asked == 0 else len(answers) > 8


def test_what_does_not_fit_is_refused():
    with pytest.raises(TaskDoesNotFit, match="length = 19: expected at least 20 tokens"):
        Bindings(keys=5).example(ByteTokenizer(), 19, 0, seed=0, split="train")
    with pytest.raises(ValueError, match="depth is not a setting"):
        Bindings().example(ByteTokenizer(), 100, 0, seed=0, split="train", depth=0.5)
    assert len(Bindings(keys=5).example(ByteTokenizer(), 20, 0, seed=0, split="train").ids) == 20


def test_a_key_may_be_bound_once():
    task = Bindings(keys=5, anew=False)
    for i in range(10):
        ids, answers, depths, _ = task.example(ByteTokenizer(), 400, i, seed=0, split="train")
        text = bytes(ids.tolist()).decode()
        keys = {text[2 * n]: text[2 * n + 1] for n in range(5)}
        pairs = [text[at : at + 2] for at in range(10, 400, 2)]
        assert len(keys) == 5 and all(key not in keys for key, _ in pairs if key.islower())
        assert all(keys[key.lower()] == value for key, value in pairs if key.isupper())
        asked = [key for key, _ in pairs if key.isupper()]
        assert asked[5:] == asked[:-5] and len(set(asked)) == 5 and len(asked) == len(answers) > 60 and max(depths) < 5 / 195
    with pytest.raises(SpecError, match="keys = 26: expected from 1 to 25 letters, others left"):
        Bindings(keys=26, anew=False)
