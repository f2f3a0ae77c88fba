"""Keys whose values change: pairs "a7", every key several times with other values, then every key once, asked for its last.

What is bound once can be kept by a sum of all pairs; what is bound anew only by a memory that overwrites (DeltaNet, 2021;
Zoology, Arora et al. 2023). Examples as in `recall`.
"""

import dataclasses
import string

import numpy as np

from lcx.data.recall import Recall, RecallExample, TaskDoesNotFit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bindings(Recall):
    """keys: letters that are bound. values: how many digits there are to bind to. Pairs, in any order, fill the length; every
    key has one at least."""

    keys: int = 16
    values: int = 10

    def validate(self):
        super().validate()
        self.check(1 <= self.keys <= 26, "keys", "from 1 to 26 letters")
        self.check(2 <= self.values <= 10, "values", "from 2 to 10 digits")

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        if depth is not None:
            raise ValueError("Bindings: depth is not a setting: every key is asked for, wherever it was bound last")
        rng = self.generator(i, seed, split)
        key, value = ([tokenizer.encode(one) for one in text] for text in (string.ascii_lowercase, string.digits))
        sizes = {len(ids) for ids in (*key, *value)}
        if sizes != {1}:
            raise ValueError(f"Bindings: tokenizer: expected a letter or digit to be one token, not {sorted(sizes)}")
        pairs = length // 2 - self.keys
        if pairs < self.keys:
            raise TaskDoesNotFit(self, length, 4 * self.keys)
        letters = rng.permutation(26)[: self.keys]
        bound = np.concatenate([np.arange(self.keys), rng.integers(0, self.keys, pairs - self.keys)])
        bound, digits = rng.permutation(bound), rng.integers(0, self.values, pairs)
        last = {int(k): n for n, k in enumerate(bound)}
        asked = rng.permutation(self.keys)
        named = np.concatenate([bound, asked])
        given = np.concatenate([digits, [digits[last[int(k)]] for k in asked]])
        ids = np.stack([np.concatenate(key)[letters[named]], np.concatenate(value)[given]], axis=1).reshape(-1)
        answers = tuple((2 * n + 1, 2 * n + 2) for n in range(pairs, pairs + self.keys))
        return RecallExample(ids, answers, tuple(last[int(k)] / pairs for k in asked))

    @classmethod
    def examples(cls):
        return (cls(), cls(keys=3, values=2, loss="all"))
