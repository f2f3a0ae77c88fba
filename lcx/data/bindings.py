"""Keys whose values change: pairs "a7" bind a letter to a digit, again and again; "A7" asks for what it is bound to now.

What is bound once can be kept by a sum of all pairs; what is bound anew only by a memory that overwrites (DeltaNet, 2021;
Zoology, Arora et al. 2023). Examples as in `recall`.
"""

import dataclasses
import string

import numpy as np

from lcx.data.recall import Recall, RecallExample, TaskDoesNotFit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bindings(Recall):
    """keys: letters that are bound. values: how many digits there are to bind to. asked: the share of pairs that ask, in any
    order with those that bind; behind them every key is asked for once. anew: whether keys are bound again and again; else
    every key is bound once, at the beginning, pairs that do not ask are of other letters, which nothing asks for, and keys are
    asked for in turn, so that an answer given before is as far away as `keys / asked` pairs."""

    keys: int = 16
    values: int = 10
    asked: float = 0.5
    anew: bool = True

    def validate(self):
        super().validate()
        most = 26 if self.anew else 25
        self.check(1 <= self.keys <= most, "keys", f"from 1 to {most} letters" + ("" if self.anew else ", others left"))
        self.check(2 <= self.values <= 10, "values", "from 2 to 10 digits")
        self.check(0 <= self.asked < 1, "asked", "from 0 to less than 1")

    def example(self, tokenizer, length, i, *, seed, split, depth=None):
        if depth is not None:
            raise ValueError("Bindings: depth is not a setting: keys are asked for wherever they were bound")
        rng = self.generator(i, seed, split)
        lower, upper, digit = (
            [tokenizer.encode(one) for one in text] for text in (string.ascii_lowercase, string.ascii_uppercase, string.digits)
        )
        sizes = {len(ids) for ids in (*lower, *upper, *digit)}
        if sizes != {1}:
            raise ValueError(f"Bindings: tokenizer: expected a letter or digit to be one token, not {sorted(sizes)}")
        pairs = length // 2 - self.keys
        if pairs < self.keys:
            raise TaskDoesNotFit(self, length, 4 * self.keys)
        letters = rng.permutation(26)
        named = np.concatenate([np.arange(self.keys), rng.integers(0, self.keys, pairs - self.keys)])
        asks = np.concatenate([np.zeros(self.keys, bool), rng.random(pairs - self.keys) < self.asked])
        order = rng.permutation(pairs)
        last = rng.permutation(self.keys)
        if not self.anew:
            order[: self.keys], order[self.keys :] = rng.permutation(self.keys), np.arange(self.keys, pairs)
            turn = np.cumsum(asks) - 1
            others = rng.integers(self.keys, 26, pairs - self.keys)
            named[self.keys :] = np.where(asks, last[turn % self.keys], np.r_[named[: self.keys], others])[self.keys :]
            last = np.roll(last, -(turn[-1] + 1))
        named = np.concatenate([named[order], last])
        asks = np.concatenate([asks[order], np.ones(self.keys, bool)])
        values, ids, answers, depths = rng.integers(0, self.values, len(named)), [], [], []
        now: dict[int, tuple[int, int]] = {}  # value and place of each key's last pair
        for n, (key, ask) in enumerate(zip(named.tolist(), asks.tolist(), strict=True)):
            if ask and key in now:
                value, place = now[key]
                answers.append((2 * n + 1, 2 * n + 2))
                depths.append(place / pairs)
                ids += [upper[letters[key]], digit[value]]
            else:  # a key that is not bound yet is bound
                now[key] = int(values[n]), n
                ids += [lower[letters[key]], digit[values[n]]]
        return RecallExample(np.concatenate(ids), tuple(answers), tuple(depths))

    @classmethod
    def examples(cls):
        return (cls(), cls(keys=3, values=2, asked=0.0, loss="all"), cls(keys=3, anew=False))
