"""Gist tokens (Mu et al. 2023): a prompt is followed by a few gist tokens, and what comes behind them sees no more of it.

A gist is a token of the vocabulary, `token`, that stands in the text. Of each document,

    gist      tokens up to the last gist see those before them; tokens behind it see the gists and each other
    negative  tokens behind the gists do not see them either: how far one gets without the prompt
    positive  tokens see all before them: how far one gets with it

Positions stay what they are. A document without gists is an ordinary one. The gists of a document stand together: behind a
second run of them nothing can be answered, nor by a state that `GistDecoderModel.compressed` took from a text whose newest
token is not its last gist.
"""

import dataclasses
from typing import Literal

from lcx.attention.mask import Hide
from lcx.memory.model_memory import ModelMemory

BEFORE, GIST, AFTER = 0, 1, 2  # roles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gist(ModelMemory):
    """token: which one is a gist. control: see above."""

    token: int
    control: Literal["gist", "negative", "positive"] = "gist"

    def validate(self):
        self.check(self.token >= 0, "token", "a token")

    @property
    def hides(self):
        prompt = Hide(query_role=AFTER, key_role=BEFORE)
        return {"gist": prompt, "negative": prompt & Hide(query_role=AFTER, key_role=GIST), "positive": None}[self.control]

    @classmethod
    def examples(cls):
        return (cls(token=1), cls(token=1, control="negative"))
