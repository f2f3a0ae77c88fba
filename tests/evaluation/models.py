"""Stand-ins for a model with known answers."""

import numpy as np

from lcx.data.tokenizers import ByteTokenizer
from lcx.inference.generate import Generated
from lcx.inference.language_model import Scored


class Uniform:
    """Every token has probability 1/259 and the likeliest is always byte 0."""

    tokenizer, window = ByteTokenizer(), 4096

    def encode(self, text):
        return self.tokenizer.encode(text).tolist()

    def logprobs(self, rows, starts, *, placed=None):
        return [Scored(np.full(len(r) - s, -np.log(259)), np.asarray(r[s:]) == 0) for r, s in zip(rows, starts, strict=True)]

    def generate(self, prompts, max_new, *, placed=None):
        return [Generated([0] * max_new, [0.0] * max_new, "length") for _ in prompts]


class Copier(Uniform):
    """Knows what followed the last `tail` bytes when they stood before, and is sure of it; unsure (2 nats) elsewhere."""

    def __init__(self, tail=4):
        self.tail = tail

    def _next(self, ids):
        tail, found = tuple(ids[-self.tail :]), None
        for i in range(self.tail, len(ids)):
            if tuple(ids[i - self.tail : i]) == tail:
                found = ids[i]
                break
        return found

    def logprobs(self, rows, starts, *, placed=None):
        scored = []
        for row, start in zip(rows, starts, strict=True):
            hits = np.asarray([self._next(row[:i]) == row[i] for i in range(start, len(row))])
            scored.append(Scored(np.where(hits, 0.0, -2.0), hits))
        return scored

    def generate(self, prompts, max_new, *, placed=None):
        made = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(max_new):
                ids.append(self._next(ids) or 0)
            made.append(Generated(ids[len(prompt) :], [0.0] * max_new, "length"))
        return made
