"""Streaming gives the tokens of `generate`, and whole characters."""

import pytest

from lcx.data.tokenizers import ByteTokenizer
from lcx.inference.generate import generate
from lcx.inference.sampling import Sampling
from lcx.inference.stream import stream, text_of


@pytest.mark.parametrize("prompt, sampling", [([5], Sampling(temperature=1.0, top_k=20)), (list(range(30, 70)), Sampling())])
def test_the_tokens_are_those_of_generate(model, prompt, sampling):
    options = {"max_new": 12, "sampling": sampling, "chunk": 16}
    whole = generate(model, [prompt], seeds=[3], **options)[0].ids
    assert list(stream(model, prompt, seed=3, **options)) == whole
    stop = whole[5]
    assert list(stream(model, prompt, seed=3, stop=(stop,), **options)) == whole[: whole.index(stop)]


def test_nothing_to_continue_is_refused(model):
    with pytest.raises(ValueError, match="expected at least one token of each"):
        next(stream(model, [], max_new=3))


@pytest.mark.parametrize("text", ["plain", "naïve – ∑ 🙂!", "🙂"])
def test_pieces_are_whole_characters(text):
    ids = ByteTokenizer().encode(text).tolist()
    pieces = list(text_of(ids, ByteTokenizer()))
    assert pieces == list(text)


def test_bytes_that_are_no_text_are_shown_as_such():
    assert "".join(text_of([97, 255, 255, 255, 255, 98, 0xF0, 0x9F], ByteTokenizer())) == ByteTokenizer().decode(
        [97, 255, 255, 255, 255, 98, 0xF0, 0x9F]
    )


def test_a_character_behind_bytes_that_are_no_text():
    ids = [0x80, 0x80, 0x80, 0xC3, 0xA9, 120]
    assert "".join(text_of(ids, ByteTokenizer())) == ByteTokenizer().decode(ids)
