"""Perplexity of held-out text by length and by position in the window.

Windows are disjoint pieces of documents at least as long as the length, each read alone from its start; every token but a
window's first is scored once. Rows: `nll` in nats a token, over all of a window, over each of `buckets` equal stretches of it
and over its last half (what a longer context is for), with the count of tokens behind each number. A token of the byte
tokenizer is a byte, so there `nll` is nats a byte.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np

from lcx.data.sources import Source
from lcx.evaluation.tasks.task import NLL, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """windows: how many are read, spread evenly over all that the source has. fewer: what becomes of a length that the source
    has fewer of; `take` reads those, at least one. buckets: stretches of a window. prompt: its first tokens, read ahead as a
    prompt is; what is scored, and cut in stretches, is the rest."""

    name: str = "text"
    source: Source
    windows: int = 32
    fewer: Literal["refuse", "take"] = "refuse"
    buckets: int = 4
    prompt: int = 0

    def validate(self):
        self.check(self.prompt >= 0, "prompt", "0 or more tokens")
        for field in ("windows", "buckets"):
            self.check(getattr(self, field) >= 1, field, "at least 1")

    @property
    def metrics(self):
        return {"nll": NLL}

    def inputs(self, tokenizer, length) -> list[list[int]]:
        """The windows. Raises SpecError if the source has none of this length, or fewer than are wanted and not to be taken."""
        if length - self.prompt < 2 * self.buckets:
            self.fail("buckets", self.buckets, f"at most half of length = {length} behind prompt = {self.prompt}")
        documents = self.source.documents()
        found, longest = [], 0
        for i in range(len(documents)):
            ids = tokenizer.encode(documents[i])
            longest = max(longest, len(ids))
            found += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        if not found:
            self.fail("source", self.source, f"a document of length = {length} tokens or more; its longest has {longest}")
        if len(found) < self.windows and self.fewer == "refuse":
            expected = f"at most what the source has, {len(found)} of length {length}, or fewer = 'take'"
            self.fail("windows", self.windows, expected)
        windows = min(self.windows, len(found))
        return [found[n * len(found) // windows].tolist() for n in range(windows)]

    def measure(self, model, length):
        rows = self.inputs(model.tokenizer, length)
        start = self.prompt
        losses = -np.stack([scored.logprobs for scored in model.logprobs(rows, [max(start, 1)] * len(rows))]).astype(np.float64)
        positions = np.arange(max(start, 1), length)
        measured = [self._row(length, losses, positions, start, length, "all")]
        measured.append(self._row(length, losses, positions, (start + length) // 2, length, "last half"))
        edges = [start + n * (length - start) // self.buckets for n in range(self.buckets + 1)]
        for low, high in itertools.pairwise(edges):
            measured.append(self._row(length, losses, positions, low, high, f"{low}-{high}"))
        return measured

    def _row(self, length, losses, positions, low, high, bucket):
        inside = losses[:, (positions >= low) & (positions < high)]
        tokens = np.full(len(inside), inside.shape[1])
        return self.row("nll", length, inside.mean(axis=1), tokens, bucket=bucket)

    @classmethod
    def examples(cls):
        from lcx.data.sources import StandardLibrary

        return (cls(source=StandardLibrary(split="heldout"), windows=2, buckets=2),)
