"""The text of tokens in pieces is the text of them together, cut before the stop string that is whole first."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from lcx.data.tokenizers import ByteTokenizer, HFTokenizer
from lcx.inference.text import Unfolding

BYTES = ByteTokenizer()
FILE = Path(__file__).parents[1] / "oracles" / "golden" / "hf" / "llama3.1" / "tokenizer.json"
LETTERS = HFTokenizer(path=str(FILE), eos_token="</s>")


def unfolded(tokenizer, ids, sizes, stops=()):
    text, rest, pieces = Unfolding(tokenizer, stops), list(ids), []
    for size in itertools.cycle(sizes):
        if not rest or text.stopped:
            break
        part, rest = rest[:size], rest[size:]
        pieces.append(text.add(part))
    return [*pieces, text.end()], text


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (7,)])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_make_the_text(sizes, seed):
    rng = np.random.default_rng(seed)
    plain = "naïve – ∑ 🙂!" * 3
    texts = BYTES.encode(plain).tolist(), rng.integers(0, 256, 40).tolist(), [*BYTES.encode("a🙂").tolist(), 0xF0, 0x9F]
    for ids in texts:
        assert "".join(unfolded(BYTES, ids, sizes)[0]) == BYTES.decode(ids)
    ids = rng.integers(0, LETTERS.size, 30).tolist()
    assert "".join(unfolded(LETTERS, ids, sizes)[0]) == LETTERS.decode(ids)


@pytest.mark.parametrize("sizes", [(1,), (3,), (50,)])
@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one, two, three", (", th", "wo,"), "one, t"),
        ("aabaabaaac", ("aaa",), "aabaab"),
        ("ends with the beginnin", ("beginning",), "ends with the beginnin"),
        ("x🙂y", ("🙂",), "x"),
    ],
)
def test_a_stop_string_cuts(sizes, text, stops, wanted):
    ids = BYTES.encode(text).tolist()
    pieces, state = unfolded(BYTES, ids, sizes, stops)
    assert "".join(pieces) == wanted
    assert state.stopped == (wanted != text)
    if state.stopped:
        whole = next(n for n in range(len(ids) + 1) if any(stop in BYTES.decode(ids[:n]) for stop in stops))
        assert state.needed == whole


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="expected no empty stop string"):
        Unfolding(BYTES, ("",))
