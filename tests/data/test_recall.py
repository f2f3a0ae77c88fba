"""Recall examples can be answered from their own text, fit exactly, and keep training and test apart."""

import re

import numpy as np
import pytest

from lcx.data.recall import Needles, Records, TaskDoesNotFit
from lcx.data.rows import Joined, collate
from lcx.data.sources import StandardLibrary
from lcx.data.tokenizers import ByteTokenizer
from lcx.spec import SpecError

BYTES = ByteTokenizer()


def make(spec, length, i=0, **options):
    return spec.example(BYTES, length, i, **({"seed": 0, "split": "test"} | options))


@pytest.mark.parametrize("spec", [Needles(), Needles(needles=5, queries=3), Needles(haystack=StandardLibrary(split="heldout"))])
@pytest.mark.parametrize("length", [201, 512])
def test_needles_are_answered_by_their_text(spec, length):
    for i in range(5):
        ids, answers, depths = make(spec, length, i)
        assert len(ids) == length
        text = bytes(ids.astype(np.uint8))
        for (start, stop), depth in zip(answers, depths, strict=True):
            key = re.search(rb"Key (\w+) is$", text[:start])[1]
            sources = list(re.finditer(rb"Key %s is(?= \d{4}\. )" % key, text))
            assert len(sources) == 2
            assert text[sources[0].end() : sources[0].end() + stop - start] == text[start:stop]
            room = length - 17 * (spec.needles + spec.queries)
            before = len(re.findall(rb"Key [a-z]{3} is \d{4}\. ", text[: sources[0].start()]))
            assert sources[0].start() - 17 * before == int(depth * (room + 1))


def test_depth_places_the_needle():
    early, late = (make(Needles(), 400, 7, depth=depth) for depth in (0.0, 1.0))
    assert bytes(early.ids[:4].astype(np.uint8)) == b"Key "
    room = 400 - len("Key abc is 1234. ") - len("Key abc is 1234. ")
    assert bytes(late.ids[room : room + 4].astype(np.uint8)) == b"Key "


def test_content_does_not_depend_on_length():
    found = [re.findall(rb"Key (\w+) is (\d+)", bytes(make(Needles(needles=3), n).ids.astype(np.uint8))) for n in (150, 999)]
    assert sorted(set(found[0])) == sorted(set(found[1]))


@pytest.mark.parametrize("length", [10, 128, 131, 1024])
def test_records_fill_the_length(length):
    ids, answers, _ = make(Records(), length)
    pairs = length // 10
    assert len(ids) == pairs * 10 and len(answers) == pairs
    text = bytes(ids.astype(np.uint8)).decode()
    known = dict(re.findall(r"(\w\w):(\d)", text[: pairs * 5]))
    assert len(known) == pairs
    for start, stop in answers:
        assert known[text[start - 3 : start - 1]] == text[start:stop]


def test_training_rows_weigh_the_answers():
    row = Needles().rows(BYTES, 128, 5)[3]
    assert bytes(row.targets[row.weights == 1].astype(np.uint8)) == bytes(row.tokens[-7:-2].astype(np.uint8))
    everything = Needles(loss="all").rows(BYTES, 128, 5)[3]
    assert everything.weights.tolist() == [1.0] * 127 + [0.0]


def test_train_and_test_are_apart():
    texts = {split: {make(Needles(), 128, i, split=split).ids.tobytes() for i in range(50)} for split in ("train", "test")}
    assert len(texts["train"]) == len(texts["test"]) == 50
    assert not texts["train"] & texts["test"]


def test_too_short_a_length_is_refused():
    with pytest.raises(TaskDoesNotFit, match=r"length = 20: expected at least 34 tokens"):
        make(Needles(), 20)
    assert len(make(Needles(), 34).ids) == 34
    with pytest.raises(TaskDoesNotFit, match="at least 10"):
        make(Records(), 9)
    with pytest.raises(SpecError, match=r"queries = 2: expected from 1 to needles = 1"):
        Needles(queries=2)


def test_joined_rows_are_short_documents_side_by_side():
    short, joined = Records().rows(BYTES, 25, 5), Joined(rows_of=Records(), parts=4).rows(BYTES, 100, 5)
    row = joined[3]
    for n in range(4):
        part, here = short[12 + n], slice(25 * n, 25 * n + 25)
        assert np.array_equal(row.tokens[here], part.tokens) and np.array_equal(row.targets[here], part.targets)
        assert np.array_equal(row.weights[here], part.weights)
        assert np.array_equal(row.segments[here], part.segments * (n + 1))
    assert collate([row]).info.index[0, 25:27].tolist() == [0, 1]
    with pytest.raises(SpecError, match=r"Joined\.parts = 3: expected a divisor of length = 100"):
        Joined(rows_of=Records(), parts=3).rows(BYTES, 100, 5)
