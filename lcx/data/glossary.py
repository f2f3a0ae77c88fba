"""A glossary and questions about it: pairs "a7" bind letters to digits, gist tokens may follow, and "A7" asks for one.

Behind gists that stand for the glossary its pairs are seen no more (`lcx.memory.gist`). Examples as in `recall`.
"""

import dataclasses
import string

import numpy as np

from lcx.data.recall import Recall, RecallExample, TaskDoesNotFit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glossary(Recall):
    """keys: letters, each bound once. gists: tokens `mark` behind them. The rest of the length asks."""

    keys: int = 8
    gists: int = 4
    mark: str = "\x01"

    def validate(self):
        super().validate()
        self.check(1 <= self.keys <= 26, "keys", "from 1 to 26 letters")
        self.check(self.gists >= 0, "gists", "0 or a positive number")
        self.check(len(self.mark) == 1 and not self.mark.isalnum(), "mark", "one character, no letter or digit")

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        if depth is not None:
            raise ValueError("Glossary: depth is not a setting: keys are asked for wherever they were bound")
        rng = self.generator(i, seed, split)
        one = {char: tokenizer.encode(char) for char in string.ascii_letters + string.digits + self.mark}
        if wide := [char for char, ids in one.items() if len(ids) != 1]:
            raise ValueError(f"Glossary: tokenizer: expected a letter, digit or mark to be one token, not {wide[0]!r}")
        asks = (length - 2 * self.keys - self.gists) // 2
        if asks < 1:
            raise TaskDoesNotFit(self, length, 2 * self.keys + self.gists + 2)
        letters, values = rng.permutation(26)[: self.keys], rng.integers(0, 10, self.keys)
        told = "".join(string.ascii_lowercase[key] + str(value) for key, value in zip(letters, values, strict=True))
        asked = rng.integers(0, self.keys, asks)
        asked_for = "".join(string.ascii_uppercase[letters[n]] + str(values[n]) for n in asked)
        text = told + self.mark * self.gists + asked_for
        first = 2 * self.keys + self.gists
        answers = tuple((first + 2 * n + 1, first + 2 * n + 2) for n in range(asks))
        ids = np.concatenate([one[char] for char in text])
        return RecallExample(ids, answers, tuple((asked / self.keys).tolist()))

    @classmethod
    def examples(cls):
        return (cls(keys=3, gists=1), cls(keys=2, gists=0))
