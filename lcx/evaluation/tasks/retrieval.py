"""Recall over length and depth: passkey (one needle), multi-key (several), associative records.

`teacher_forced` scores every answer of a sequence given what truly stands before it: exact (all its tokens are the model's
first choice), token accuracy and nats a token. `greedy` generates the first answer and compares. The two exact matches agree
for one answer, since a first wrong token is what counts; the forced form is far cheaper.
"""

import dataclasses
from typing import Literal

import numpy as np

from lcx.data.recall import Needles, Recall, RecallExample, Records
from lcx.evaluation.scorers import exact_match, forced_exact, forced_nll, forced_token_accuracy
from lcx.evaluation.tasks.task import Task
from lcx.inference.language_model import TokenModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """generator: makes the sequences. examples: a length, or a length and depth where `depths` places the first answer."""

    generator: Recall
    examples_each: int = 32
    depths: tuple[float, ...] = ()
    mode: Literal["teacher_forced", "greedy"] = "teacher_forced"

    def validate(self):
        self.check(self.examples_each >= 1, "examples_each", "at least 1")
        self.check(all(0 <= depth <= 1 for depth in self.depths), "depths", "numbers from 0 (the start) to 1")
        placed = not self.depths or not isinstance(self.generator, Records)
        self.check(placed, "depths", "none: the answers of Records stand at every depth")

    def measure(self, model, length):
        rows = []
        for depth in self.depths or (None,):
            options = {"seed": self.seed, "split": "test", "depth": depth}
            examples = [self.generator.example(model.tokenizer, length, i, **options) for i in range(self.examples_each)]
            more = {} if depth is None else {"depth": depth}
            rows += (
                self._greedy(model, examples, length, more)
                if self.mode == "greedy"
                else self._forced(model, examples, length, more)
            )
        return rows

    def _forced(self, model: TokenModel, examples: list[RecallExample], length: int, more: dict):
        first = [min(start for start, _ in example.answers) for example in examples]
        scored = model.logprobs([example.ids.tolist() for example in examples], first)
        exact, accuracy, losses = [], [], []
        for example, start, found in zip(examples, first, scored, strict=True):
            # With depths, only the answer that was placed counts.
            answers = example.answers[:1] if self.depths else example.answers
            spans = [slice(a - start, b - start) for a, b in answers]
            exact.append(np.mean([forced_exact(found.greedy[span]) for span in spans]))
            accuracy.append(np.mean([forced_token_accuracy(found.greedy[span]) for span in spans]))
            losses.append(np.mean([forced_nll(found.logprobs[span]) for span in spans]))
        counts = [1 if self.depths else len(example.answers) for example in examples]
        named = {"exact": exact, "token_accuracy": accuracy, "nll": losses}
        return [self.row(metric, length, values, counts, mode=self.mode, **more) for metric, values in named.items()]

    def _greedy(self, model: TokenModel, examples: list[RecallExample], length: int, more: dict):
        prompts, answers = [], []
        for example in examples:
            start, stop = example.answers[0]
            prompts.append(example.ids[:start].tolist())
            answers.append(example.ids[start:stop].tolist())
        made = model.generate(prompts, max(map(len, answers)))
        exact = [exact_match(row.ids[: len(answer)], answer) for row, answer in zip(made, answers, strict=True)]
        return [self.row("exact", length, exact, mode=self.mode, **more)]

    @classmethod
    def examples(cls):
        return (
            cls(name="passkey", generator=Needles(), examples_each=2, depths=(0.0, 1.0)),
            cls(name="passkey", generator=Needles(), examples_each=2, mode="greedy"),
            cls(name="multi_key", generator=Needles(needles=3, queries=2), examples_each=2),
            cls(name="records", generator=Records(), examples_each=2),
        )
