"""Rows of conversations, written out by a chat template; what the model said is learned, the rest is read (SFT).

A conversation is a document of its own, never cut. It ends behind its last answer. It is tokenised as a whole; an answer's
tokens are those of its characters.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from lcx.data.packing import BestFit
from lcx.data.rows import Row, Rows, RowSet
from lcx.data.sources import Source, SourceError
from lcx.data.tokenizers import HFTokenizer, Tokenizer
from lcx.interop.chat import ChatError, ChatTemplate, chat_template
from lcx.spec import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chats(Rows):
    """source: its documents are JSON lists of messages (`ChatLines`). template: a folder with a chat template; None is that of
    the tokenizer. longer: what becomes of conversations longer than a row. most: conversations of a row; None is as many as
    fit."""

    source: Source
    template: str | None = None
    longer: Literal["refuse", "drop"] = "refuse"
    most: int | None = None

    def validate(self):
        self.check(self.most is None or self.most >= 1, "most", "at least 1 conversation, or None")

    def documents(self, length):
        return length if self.most is None else min(self.most, length)

    def check_fit(self, tokenizer, length):
        self._template(tokenizer)

    def rows(self, tokenizer, length, seed):
        return ChatRows(self, self._template(tokenizer), tokenizer, length, seed)

    def _template(self, tokenizer: Tokenizer) -> ChatTemplate:
        if self.template is not None:
            return chat_template(self.template)
        if not isinstance(tokenizer, HFTokenizer):
            self.fail("template", None, f"a folder with a chat template beside a {type(tokenizer).__name__}, which has none")
        return chat_template(Path(tokenizer.path).parent)


class ChatRows(RowSet):
    def __init__(self, spec: Chats, template: ChatTemplate, tokenizer: Tokenizer, length: int, seed: int):
        documents = spec.source.documents()
        order = np.random.default_rng(seed).permutation(len(documents))
        found = [encoded(template, tokenizer, documents[i], f"{spec.source}, {documents.names[i]}") for i in order]
        longest = max(len(ids) for ids, _ in found)
        if longest > length and spec.longer == "refuse":
            name = documents.names[order[np.argmax([len(ids) for ids, _ in found])]]
            expected = f"expected data.length = {length} at least as long, or longer = 'drop'"
            raise SpecError(f"Chats.source: {name} is {longest} tokens long: {expected}")
        kept = [pair for pair in found if len(pair[0]) <= length]
        if not kept:
            raise SpecError(f"Chats.source: every conversation is longer than data.length = {length}")
        self._ids, self._said = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        self._plan = BestFit().plan(np.asarray([len(ids) for ids, _ in kept]), length, spec.documents(length))
        self._length, self._pad = length, tokenizer.pad
        self._counts = {"conversations": len(found), "conversations_dropped": len(found) - len(kept)}
        self._counts |= {"tokens": len(self._ids), "tokens_learned": int(self._said.sum())}
        self._counts["tokens_padded"] = len(self._plan) * length - len(self._ids)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, i: int) -> Row:
        tokens = np.full(self._length, self._pad, np.int32)
        targets, segments = tokens.copy(), np.zeros(self._length, np.int32)
        weights, at = np.zeros(self._length, np.float32), 0
        for number, (start, stop) in enumerate(self._plan[i], start=1):
            size = stop - start
            tokens[at : at + size], segments[at : at + size] = self._ids[start:stop], number
            targets[at : at + size - 1] = self._ids[start + 1 : stop]
            weights[at : at + size - 1] = self._said[start + 1 : stop]
            at += size
        return Row(tokens, targets, weights, segments)

    def counts(self):
        return self._counts


def encoded(template: ChatTemplate, tokenizer: Tokenizer, document: str, place: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, whether the model said each) of a conversation. Raises SourceError where it has no answer or is none."""
    try:
        pieces = template.turns(json.loads(document))
    except (ChatError, ValueError) as error:
        raise SourceError(f"{place}: {error}") from None
    if not any(said and text for text, said in pieces):
        raise SourceError(f"{place}: no message of the assistant: expected at least one, which is what is learned")
    ids, spans = tokenizer.spans("".join(text for text, _ in pieces))
    ends = np.cumsum([len(text) for text, _ in pieces])
    starts, stops = (np.asarray(side, np.int64) for side in zip(*spans, strict=True))
    piece, last = (np.searchsorted(ends, side, side="right") for side in (starts, np.maximum(starts, stops - 1)))
    if (piece != last).any():
        n = int(np.argmax(piece != last))
        raise SourceError(f"{place}: token {n} stands across the edge of an answer: expected a template that parts them")
    learned = np.asarray([said for _, said in pieces])[np.minimum(piece, len(pieces) - 1)]
    return ids.astype(np.int32), learned
