"""Packing against rows written by hand, a brute-force best fit, and the rule that every token is predicted once."""

import numpy as np
import pytest

from lcx.data.packing import BestFit, ConcatAndSplit, PackedText
from lcx.data.rows import collate
from lcx.data.sources import TextFolder
from lcx.data.tokenizers import ByteTokenizer

EOS, PAD = 257, 258


@pytest.fixture
def folder(tmp_path):
    for name, text in {"a": "abcde", "b": "xy", "c": "0123456789"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return TextFolder(path=str(tmp_path))


def in_file_order(monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", lambda seed: type("R", (), {"permutation": staticmethod(np.arange)}))


def test_concat_and_split_by_hand(folder, monkeypatch):
    in_file_order(monkeypatch)
    rows = PackedText(source=folder).rows(ByteTokenizer(), 8, 0)
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


def brute_force(pieces, length):
    rows = []
    for n in sorted(pieces, reverse=True):
        fitting = [row for row in rows if sum(row) + n <= length]
        if fitting:
            max(fitting, key=sum).append(n)
        else:
            rows.append([n])
    return sorted(sum(row) for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_equals_brute_force(seed):
    lengths = np.random.default_rng(seed).integers(1, 30, 200)
    rows = BestFit().plan(lengths, 32)
    assert sorted(sum(b - a for a, b in row) for row in rows) == brute_force(lengths.tolist(), 32)


@pytest.mark.parametrize("packing", [ConcatAndSplit(), BestFit()])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_every_token_is_predicted_once(folder, packing, length):
    rows = PackedText(source=folder, packing=packing).rows(ByteTokenizer(), length, 3)
    batch = collate([rows[i] for i in range(len(rows))])
    predicted = sorted(batch.targets[batch.loss_weights == 1].tolist())
    wanted = sorted(x for text in (b"abcde", b"xy", b"0123456789") for x in [*text[1:], EOS])
    assert predicted == wanted
    assert rows.counts()["tokens_dropped"] == 0
