"""Rows of conversations: answers alone have weight, conversations stay whole, apart from each other."""

import json
from pathlib import Path

import numpy as np
import pytest

from lcx.data.chats import Chats
from lcx.data.sources import ChatLines, SourceError
from lcx.data.tokenizers import ByteTokenizer, HFTokenizer
from lcx.spec import SpecError

FOLDER = Path(__file__).parents[1] / "oracles" / "golden" / "hf" / "llama3.1"
TOKENIZER = HFTokenizer(path=str(FOLDER / "tokenizer.json"), eos_token="</s>")
TALKS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "never answered"},
    ],
]


def chats(tmp_path, talks=TALKS, **options):
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return Chats(source=ChatLines(path=str(tmp_path / "chats.jsonl")), **options)


def shown(row):
    """Each conversation's text, and what of it is learned, special tokens spelled out."""
    spell = lambda ids: "".join(TOKENIZER._loaded.id_to_token(int(i)) for i in ids)
    found = {}
    for number in range(1, row.segments.max() + 1):
        here = row.segments == number
        found[spell(row.tokens[here])] = spell(row.targets[here & (row.weights > 0)])
    return found


def test_answers_are_learned_and_the_rest_is_read(tmp_path):
    rows = chats(tmp_path).rows(TOKENIZER, 24, 0)
    (row,) = [rows[i] for i in range(len(rows))]
    first, second = "<s><u>hi</s><a>you</s>", "<s><u>a</s><a>b</s><u>c</s><a>d</s>"
    assert shown(row) == {first: "you</s>", second: "b</s>d</s>"}
    inside = (row.segments[:-1] == row.segments[1:]) & (row.segments[:-1] > 0)
    np.testing.assert_array_equal(row.targets[:-1][inside], row.tokens[1:][inside])
    counts = {"conversations": 2, "conversations_dropped": 0, "tokens": 23, "tokens_learned": 8, "tokens_padded": 1}
    assert rows.counts() == counts


def test_conversations_are_never_cut(tmp_path):
    with pytest.raises(SpecError, match=r"line 2 is 13 tokens long: expected data\.length = 12 at least as long"):
        chats(tmp_path).rows(TOKENIZER, 12, 0)
    rows = chats(tmp_path, longer="drop").rows(TOKENIZER, 12, 0)
    assert len(rows) == 1 and rows.counts()["conversations_dropped"] == 1
    with pytest.raises(SpecError, match="every conversation is longer"):
        chats(tmp_path, longer="drop").rows(TOKENIZER, 5, 0)
    alone = chats(tmp_path, most=1).rows(TOKENIZER, 24, 0)
    assert len(alone) == 2 and alone[0].segments.max() == 1


@pytest.mark.parametrize(
    ("talk", "line"),
    [
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
        ([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}], "refuses them: no role tool"),
    ],
)
def test_conversations_that_are_refused(tmp_path, talk, line):
    with pytest.raises(SourceError, match=line):
        chats(tmp_path, [talk]).rows(TOKENIZER, 24, 0)


def test_a_token_across_the_edge_of_an_answer_is_refused(tmp_path, monkeypatch):
    spans = HFTokenizer.spans

    def joined(self, text):
        ids, found = spans(self, text)
        place = next(n for n, (start, _) in enumerate(found) if text[start:].startswith("you"))
        return ids, [*found[: place - 1], (found[place - 1][0], found[place][1]), *found[place:]]

    monkeypatch.setattr(HFTokenizer, "spans", joined)
    with pytest.raises(SourceError, match="token 5 stands across the edge of an answer"):
        chats(tmp_path, TALKS[:1]).rows(TOKENIZER, 24, 0)


def test_what_is_no_conversation_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": "hi"}')
    with pytest.raises(SourceError, match=r"line 1: field 'messages': expected a list of messages"):
        ChatLines(path=str(tmp_path / "a.jsonl")).documents()
    with pytest.raises(
        SpecError, match=r"Chats\.template = None: expected a folder with a chat template beside a ByteTokenizer"
    ):
        chats(tmp_path).check_fit(ByteTokenizer(), 24)
