"""Packing against rows written by hand, a brute-force best fit, and the rule that every token is predicted once."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcx.data.packing import BestFit, ConcatAndSplit, PackedRows, PackedText
from lcx.data.rows import collate
from lcx.data.sources import Documents, TextFolder
from lcx.data.tokenizers import ByteTokenizer, Tokenizer

EOS, PAD = 257, 258


@pytest.fixture
def folder(tmp_path):
    for name, text in {"a": "abcde", "b": "xy", "c": "0123456789"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return TextFolder(path=str(tmp_path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(Tokenizer):
    """Reads "3 4 5" as the ids 3, 4, 5, so that every token of every document can be told apart."""

    size = 1 << 20
    eos = 1
    pad = 0

    def encode(self, text):
        return np.asarray([int(word) for word in text.split()], np.int32)

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_concat_and_split_by_hand(folder):
    rows = PackedRows(folder.documents(), np.arange(3), ByteTokenizer(), ConcatAndSplit(), 8)
    got = [rows[i] for i in range(len(rows))]
    a, x, d = ord("a"), ord("x"), ord("0")
    assert got[0].tokens.tolist() == [a, a + 1, a + 2, a + 3, a + 4, EOS, x, x + 1]
    assert got[0].targets.tolist() == [a + 1, a + 2, a + 3, a + 4, EOS, PAD, x + 1, EOS]
    assert got[0].weights.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert got[0].segments.tolist() == [1, 1, 1, 1, 1, 1, 2, 2]
    assert got[1].tokens.tolist() == [EOS, d, d + 1, d + 2, d + 3, d + 4, d + 5, d + 6]
    assert got[1].targets.tolist() == [PAD, d + 1, d + 2, d + 3, d + 4, d + 5, d + 6, d + 7]
    assert got[1].weights.tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    assert got[2].tokens.tolist() == [d + 7, d + 8, d + 9, EOS, PAD, PAD, PAD, PAD]
    assert got[2].weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert got[2].segments.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    batch = collate(got)
    assert batch.info.index.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert rows.counts() == {
        "documents": 3,
        "documents_split": 2,
        "tokens": 20,
        "tokens_split": 14,
        "tokens_dropped": 0,
        "tokens_padded": 4,
    }


def test_best_fit_cuts_only_long_documents():
    lengths = np.asarray([6, 3, 11, 8, 2])
    rows = BestFit().plan(lengths, 8)
    assert sorted(piece for row in rows for piece in row) == [(0, 6), (6, 9), (9, 17), (17, 20), (20, 28), (28, 30)]
    assert all(sum(b - a for a, b in row) <= 8 for row in rows)
    assert len(rows) == 4  # 8 | 8 | 6 + 2 | 3 + 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 40), st.integers(1, 4))
@pytest.mark.parametrize("packing", [BestFit(), ConcatAndSplit()])
def test_a_row_has_its_most_documents_at_most(packing, lengths, length, most):
    rows = packing.plan(np.asarray(lengths), length, most)
    assert all(0 < len(row) <= most and sum(b - a for a, b in row) <= length for row in rows)
    pieces = sorted(piece for row in rows for piece in row)
    assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])] and pieces[-1][1] == sum(lengths)
    ends = np.cumsum(lengths)
    assert all(np.searchsorted(ends, a, side="right") == np.searchsorted(ends, b - 1, side="right") for a, b in pieces)


def brute_force(pieces, length):
    rows = []
    for n in sorted(pieces, reverse=True):
        fitting = [row for row in rows if sum(row) + n <= length]
        if fitting:
            max(fitting, key=sum).append(n)
        else:
            rows.append([n])
    return sorted(sum(row) for row in rows)


@pytest.mark.parametrize("packing", [ConcatAndSplit(), BestFit()])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_every_token_is_predicted_once(folder, packing, length):
    rows = PackedText(source=folder, packing=packing).rows(ByteTokenizer(), length, 3)
    batch = collate([rows[i] for i in range(len(rows))])
    predicted = sorted(batch.targets[batch.loss_weights == 1].tolist())
    wanted = sorted(x for text in (b"abcde", b"xy", b"0123456789") for x in [*text[1:], EOS])
    assert predicted == wanted
    assert rows.counts()["tokens_dropped"] == 0


def numbered(lengths):
    """Documents whose token j of document i is 1000 (i + 1) + j, and the token after each token (1 ends a document)."""
    texts = {str(i): " ".join(str(1000 * (i + 1) + j) for j in range(n)) for i, n in enumerate(lengths)}
    after = {1000 * (i + 1) + j: 1000 * (i + 1) + j + 1 if j + 1 < n else 1 for i, n in enumerate(lengths) for j in range(n)}
    return Documents(list(texts), texts.__getitem__), after


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=12), st.integers(1, 20), st.sampled_from([ConcatAndSplit(), BestFit()])
)
def test_targets_weights_and_segments_of_any_documents(lengths, length, packing):
    documents, after = numbered(lengths)
    rows = PackedRows(documents, np.arange(len(lengths)), Numbers(), packing, length)
    batch = collate([rows[i] for i in range(len(rows))])
    seen = []
    for tokens, targets, weights, segments in zip(
        batch.tokens, batch.targets, batch.loss_weights, batch.info.segments, strict=True
    ):
        runs = [number for number, _ in itertools.groupby(segments.tolist())]
        assert runs in (list(range(1, len(runs) + 1)), [*range(1, len(runs)), 0])
        for t, token in enumerate(tokens.tolist()):
            last = t + 1 == length or segments[t + 1] != segments[t]
            if segments[t] == 0:
                assert (token, targets[t], weights[t]) == (0, 0, 0)
            elif token == 1:
                assert (targets[t], weights[t], last) == (0, 0, True)
            else:
                assert (targets[t], weights[t]) == (after[token], 1)
                assert last or tokens[t + 1] == after[token]
        seen += tokens[segments != 0].tolist()
    assert sorted(seen) == sorted([*after, *[1] * len(lengths)])
    assert rows.counts()["tokens"] == len(seen)
    assert rows.counts()["tokens_padded"] == len(rows) * length - len(seen)
    index = [[t - row.index(n) if n else 0 for t, n in enumerate(row)] for row in batch.info.segments.tolist()]
    assert batch.info.index.tolist() == batch.info.order.tolist() == batch.info.positions[..., 0].tolist() == index


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 40))
def test_best_fit_equals_brute_force(lengths, length):
    rows = BestFit().plan(np.asarray(lengths), length)
    pieces = sorted(piece for row in rows for piece in row)
    ends = np.cumsum(lengths).tolist()
    begins = [0, *ends[:-1]]
    assert pieces == [(a, min(a + length, e)) for b, e in zip(begins, ends, strict=True) for a in range(b, e, length)]
    assert sorted(sum(b - a for a, b in row) for row in rows) == brute_force([b - a for a, b in pieces], length)


def test_best_fit_leaves_little_room_on_long_tailed_lengths():
    lengths = np.random.default_rng(0).lognormal(np.log(740), 1.1, 20_000).astype(int) + 1
    start = time.process_time()
    rows = BestFit().plan(lengths, 2048)
    assert time.process_time() - start < 2
    fewest = -(-int(lengths.sum()) // 2048)
    assert len(rows) <= 1.001 * fewest
