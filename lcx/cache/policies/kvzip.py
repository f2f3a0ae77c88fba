"""KVzip (2025): tokens that a model looks at as it repeats its context; made once, for any question.

The context is read whole, then again, a chunk at a time, each behind a prompt that asks for it; nothing of that stays.

    s_j = max over the queries that repeat j's chunk, and the heads of a group, of p_ij
    p: softmax over the first `sinks` tokens, the chunk in the cache, and what of the second reading stands before the query

Chunks, prompts and the softmax are those of kvpress' KVzipPress. There the first chunk's scores stand over those of the sinks,
here sinks stay. Tokens that a codec holds in full precision stay too, beside the budget.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import TokenInfo
from lcx.cache.policies.budgets import Even
from lcx.cache.policies.policy import Kept, Policy
from lcx.cache.policies.top import top

FIRST, LATER = "\n\nRepeat the previous context exactly.", "\n\nRepeat the part of the previous context exactly, starting with"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """over: what draws on one budget: each `head`, the heads of a `layer`, or those of all layers (`model`). spread: of the
    mean, the most that a head keeps; slots are that many. sinks: of each document, the first tokens, which stay. chunk: tokens
    that a pass of the second reading repeats. first, later: ids ahead of the first chunk and of others, where the last
    `overlap` tokens of the chunk before follow. suffix: ids right ahead of the chunk. The defaults are UTF-8 bytes."""

    scope: Literal["prefill", "decode", "both"] = "prefill"
    over: Literal["head", "layer", "model"] = "model"
    spread: float = 2.0
    sinks: int = 4
    chunk: int = 2048
    first: tuple[int, ...] = tuple(FIRST.encode())
    later: tuple[int, ...] = tuple(LATER.encode())
    overlap: int = 8
    suffix: tuple[int, ...] = tuple(b"\n")

    def validate(self):
        super().validate()
        self.check(self.scope == "prefill", "scope", "'prefill', as it chooses when a prompt has been read")
        self.check(self.spread >= 1, "spread", "at least 1, all heads alike")
        room = not isinstance(self.keep, int) or self.sinks <= self.keep
        self.check(self.sinks >= 0 and room, "sinks", f"0 or more tokens, at most keep = {self.keep}")
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        self.check(0 <= self.overlap <= self.chunk, "overlap", f"0 to chunk = {self.chunk} tokens")
        apart = self.over != "model" or self.layers == Even()
        self.check(apart, "layers", "Even() beside over = 'model', where layers draw on one budget")

    def misread(self, encode: Callable[[str], Sequence[int]]) -> str:
        """What is wrong beside a tokenizer: ids of bytes, the default, that it gives another meaning. "" is nothing."""
        for name, text in (("first", FIRST), ("later", LATER), ("suffix", "\n")):
            held, ids = getattr(self, name), tuple(map(int, encode(text)))
            if held == tuple(text.encode()) != ids:
                return f"{name} = the bytes of {text!r}: expected ids of the tokenizer, which has {ids} for it"
        return ""

    @property
    def by_head(self):
        return True

    @property
    def marks(self):
        return "repeated"

    @property
    def asking(self) -> int:
        """The most tokens ahead of a chunk."""
        return max(len(self.first), len(self.later) + self.overlap) + len(self.suffix)

    def repeat(self, prompt: Sequence[int], start: int) -> list[int]:
        """What is read again for the chunk of a prompt that begins at `start`; nothing behind its end."""
        ahead = [*self.later, *prompt[start - self.overlap : start]] if start else self.first
        return [*ahead, *self.suffix, *prompt[start : start + self.chunk]] if start < len(prompt) else []

    def slots(self, length, share):
        return length

    def slots_after(self, length: int, share: float) -> int:
        """Slots of a row whose prompt has been read twice."""
        most = self.most(length, share)
        most = most if self.over == "head" else math.ceil(most * self.spread)
        return min(length, most + self.every)

    def worth(self, marks: Float[Array, "B K N"], info: TokenInfo, there: Bool[Array, "B K N"]) -> Float[Array, "B K N"]:
        """Scores, +inf of sinks and -inf where there is no token."""
        return jnp.where(there, jnp.where(info.index < self.sinks, jnp.inf, marks), -jnp.inf)

    def compress(self, now, slots):
        worth = self.worth(now.marks, now.info, now.there)
        budget = jnp.broadcast_to(now.budget.reshape(len(worth), -1), worth.shape[:2])
        index, there = top(worth, budget, slots)
        return Kept(index=index, there=there)

    def together(self, worth: Sequence[Float[Array, "B K N"]], budgets: Sequence[Int[Array, "B"]]) -> list[Int[Array, "B K"]]:
        """Budgets of key heads of layers that draw on one: what each has of the best of all, at most `spread` of the mean."""
        flat, total = [], 0
        for scores, budget in zip(worth, budgets, strict=True):
            place = jnp.argsort(jnp.argsort(-scores, axis=2, stable=True), axis=2)
            most = jnp.ceil(budget * self.spread).astype(jnp.int32)[:, None, None]
            flat.append(jnp.where(place < most, scores, -jnp.inf).reshape(len(scores), -1))
            total = total + budget * scores.shape[1]
        joint = jnp.concatenate(flat, axis=1)
        rank = jnp.argsort(jnp.argsort(-joint, axis=1, stable=True), axis=1)
        stays = (rank < total[:, None]) & (joint > -jnp.inf)
        ends = [sum(part.shape[1] for part in flat[: n + 1]) for n in range(len(flat) - 1)]
        parts = jnp.split(stays, ends, axis=1)
        return [part.reshape(scores.shape).sum(axis=2) for part, scores in zip(parts, worth, strict=True)]

    @classmethod
    def examples(cls):
        return (
            cls(keep=0.5, every=16, chunk=8, sinks=1, first=(1, 2), later=(3,), overlap=2, suffix=(4,)),
            cls(keep=8, every=16, over="layer", sinks=1),
            cls(keep=8, every=16, over="head", chunk=16),
        )
