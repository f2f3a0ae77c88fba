"""Recall over length and depth: passkey (one needle), multi-key (several), associative records.

`teacher_forced` scores every answer of a sequence given what truly stands before it: exact (all its tokens are the model's
first choice), token accuracy and nats a token. `greedy` generates the first answer and compares: exact, and the first integer
of its text, for which the model has room to say more than the answer. The two exact matches agree for one answer, since a
first wrong token is what counts; the forced form is far cheaper.
"""

import dataclasses
from typing import Literal

import numpy as np

from lcx.data.recall import Needles, Recall, RecallExample, Records, TaskDoesNotFit
from lcx.evaluation.scorers import first_integer, forced_exact, forced_nll, forced_token_accuracy, prefix_match
from lcx.evaluation.tasks.task import ANSWERS, NLL, TOKENS, Row, Task
from lcx.inference.language_model import TokenModel
from lcx.inference.requests import check_finite
from lcx.positions.visual import Placed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """generator: makes the sequences. examples_each: how many at a length, or at a length and depth where `depths` places the
    first answer; then only that answer counts. room: tokens beyond the answer's that a greedy answer may take; the sequences
    are shorter by them, so that prompt and answer fit the length.
    """

    generator: Recall
    examples_each: int = 32
    depths: tuple[float, ...] = ()
    mode: Literal["teacher_forced", "greedy"] = "teacher_forced"
    room: int = 16

    def validate(self):
        self.check(self.room >= 0, "room", "0 or a positive number")
        self.check(self.examples_each >= 1, "examples_each", "at least 1")
        inside = all(0 <= depth <= 1 for depth in self.depths) and len(set(self.depths)) == len(self.depths)
        self.check(inside, "depths", "distinct numbers from 0 (the start) to 1")
        placed = not self.depths or not isinstance(self.generator, Records)
        self.check(placed, "depths", "none: the answers of Records stand at every depth")

    @property
    def metrics(self):
        if self.mode == "greedy":
            return {"exact": ANSWERS, "first_integer": ANSWERS}
        return {"exact": ANSWERS, "token_accuracy": TOKENS, "nll": NLL}

    def inputs(self, tokenizer, length) -> dict[float | None, list[RecallExample]]:
        """Examples by depth, which is None where it is free. Raises TaskDoesNotFit."""
        room = self.room if self.mode == "greedy" else 0
        make = lambda i, depth: self.generator.example(tokenizer, length - room, i, seed=self.seed, split="test", depth=depth)
        try:
            return {depth: [make(i, depth) for i in range(self.examples_each)] for depth in self.depths or (None,)}
        except TaskDoesNotFit as error:
            raise error.beside(room) from None

    def measure(self, model, length):
        rows, measure = [], self._greedy if self.mode == "greedy" else self._forced
        for depth, examples in self.inputs(model.tokenizer, length).items():
            more = {"mode": self.mode} | ({} if depth is None else {"depth": depth})
            rows += measure(model, examples, length, more)
        return rows

    def _forced(self, model: TokenModel, examples: list[RecallExample], length: int, more: dict) -> list[Row]:
        first = [min(start for start, _ in example.answers) for example in examples]
        scored = model.logprobs([example.ids.tolist() for example in examples], first, placed=_placed(examples))
        exact, accuracy, losses, counts = [], [], [], []
        for example, start, found in zip(examples, first, scored, strict=True):
            answers = example.answers[:1] if self.depths else example.answers
            spans = [slice(a - start, b - start) for a, b in answers]
            exact.append(np.mean([forced_exact(found.greedy[span]) for span in spans]))
            accuracy.append(np.mean([forced_token_accuracy(found.greedy[span]) for span in spans]))
            losses.append(np.mean([forced_nll(found.logprobs[span]) for span in spans]))
            counts.append(len(spans))
        named = {"exact": exact, "token_accuracy": accuracy, "nll": losses}
        return [self.row(metric, length, values, counts, **more) for metric, values in named.items()]

    def _greedy(self, model: TokenModel, examples: list[RecallExample], length: int, more: dict) -> list[Row]:
        prompts, answers = [], []
        for example in examples:
            start, stop = example.answers[0]
            prompts.append(example.ids[:start].tolist())
            answers.append(example.ids[start:stop].tolist())
        placed = _placed(examples)
        if placed is not None:
            placed = [own.cut(len(prompt)) for own, prompt in zip(placed, prompts, strict=True)]
        told = model.generate(prompts, max(map(len, answers)) + self.room, placed=placed)
        for row in told:
            check_finite(row.logprobs)
        made = [row.ids for row in told]
        decode = model.tokenizer.decode
        pairs = list(zip(made, answers, strict=True))
        exact = [prefix_match(ids, answer) for ids, answer in pairs]
        integer = [first_integer(decode(ids), decode(answer)) for ids, answer in pairs]
        return [self.row("exact", length, exact, **more), self.row("first_integer", length, integer, **more)]

    @classmethod
    def examples(cls):
        return (
            cls(name="passkey", generator=Needles(), examples_each=2, depths=(0.0, 1.0)),
            cls(name="passkey", generator=Needles(), examples_each=2, mode="greedy"),
            cls(name="multi_key", generator=Needles(needles=3, queries=2), examples_each=2),
            cls(name="records", generator=Records(), examples_each=2),
        )


def _placed(examples: list[RecallExample]) -> list[Placed] | None:
    """The positions of examples that have some of their own."""
    return None if examples[0].placed is None else [example.placed for example in examples]
