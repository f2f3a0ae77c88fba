"""Tasks on stand-ins whose scores are known without running anything."""

import re

import numpy as np
import pytest
from models import Copier, Uniform

from lcx.data.recall import Needles, Records, TaskDoesNotFit
from lcx.data.sources import TextFolder
from lcx.evaluation.report import select
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.inference.generate import Generated
from lcx.inference.requests import NotFinite
from lcx.spec import SpecError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    (tmp_path / "b.txt").write_text("abcdefghijklmnopqrstuvw" * 2)
    (tmp_path / "short.txt").write_text("tiny")
    return TextFolder(path=str(tmp_path))


def test_uniform_text_costs_the_log_of_the_vocabulary(folder):
    rows = Perplexity(source=folder, windows=3, buckets=2).measure(Uniform(), 23)
    assert [row["bucket"] for row in rows] == ["all", "last half", "0-11", "11-23"]
    assert all(abs(row["value"] - np.log(259)) < 1e-9 for row in rows)
    assert [row["count"] for row in rows] == [3 * 22, 3 * 12, 3 * 10, 3 * 12]


def test_buckets_follow_positions(folder):
    """The copier pays 2 nats until the period of ten has come round: at targets 1 .. 13, nothing after."""
    rows = Perplexity(source=folder, windows=1, buckets=2).measure(Copier(), 40)
    value = {row["bucket"]: row["value"] for row in rows}
    assert value["0-20"] == pytest.approx(2 * 13 / 19)
    assert value["20-40"] == value["last half"] == 0
    assert value["all"] == pytest.approx(2 * 13 / 39)


def test_what_stands_behind_a_prompt_is_scored_alone(folder):
    rows = Perplexity(source=folder, windows=1, buckets=2, prompt=10).measure(Copier(), 40)
    value = {row["bucket"]: (row["value"], row["count"]) for row in rows}
    assert value == {
        "all": (pytest.approx(2 * 4 / 30), 30),
        "last half": (0, 15),
        "10-25": (pytest.approx(8 / 15), 15),
        "25-40": (0, 15),
    }
    with pytest.raises(ValueError, match="buckets = 4: expected at most half of length = 40 behind prompt = 33"):
        Perplexity(source=folder, prompt=33).measure(Uniform(), 40)


def test_windows_are_refused_where_the_text_ends(folder):
    with pytest.raises(ValueError, match="windows = 4: expected at most what the source has, 3 of length 40"):
        Perplexity(source=folder, windows=4).measure(Uniform(), 40)
    every = Perplexity(source=folder, windows=4, fewer="take")
    assert len(every.inputs(Uniform().tokenizer, 40)) == 3
    with pytest.raises(ValueError, match=r"source = TextFolder.*: expected a document of length = 4000 tokens"):
        every.inputs(Uniform().tokenizer, 4000)
    with pytest.raises(ValueError, match="buckets = 4: expected at most half of length = 7"):
        Perplexity(source=folder).measure(Uniform(), 7)


@pytest.mark.parametrize("mode", ["teacher_forced", "greedy"])
def test_copier_finds_the_needle_and_uniform_does_not(mode):
    task = Retrieval(name="needle", generator=Needles(), examples_each=8, depths=(0.0, 0.5, 1.0), mode=mode)
    rows = select(task.measure(Copier(tail=7), 150), metric="exact")
    assert [(row["depth"], row["value"], row["count"]) for row in rows] == [(0.0, 1, 8), (0.5, 1, 8), (1.0, 1, 8)]
    assert all(row["value"] == 0 for row in select(task.measure(Uniform(), 150), metric="exact"))


def test_the_first_integer_counts_where_the_exact_answer_does_not():
    class Wordy(Uniform):
        def generate(self, prompts, max_new, *, placed=None):
            values = [re.search(r"Key \w+ is (\d+)", self.tokenizer.decode(prompt))[1] for prompt in prompts]
            answers = [self.encode(f"It is {value}.")[:max_new] for value in values]
            return [Generated(answer, [0.0] * len(answer), "stop") for answer in answers]

    rows = Retrieval(name="needle", generator=Needles(), examples_each=4, mode="greedy").measure(Wordy(), 150)
    assert {row["metric"]: row["value"] for row in rows} == {"exact": 0, "first_integer": 1}


def test_prompt_and_greedy_answer_fit_the_length():
    class Window(Uniform):
        def generate(self, prompts, max_new, *, placed=None):
            assert all(len(prompt) + max_new <= 50 for prompt in prompts) and max_new == 5 + 16
            return super().generate(prompts, max_new)

    task = Retrieval(name="needle", generator=Needles(), examples_each=4, mode="greedy")
    task.measure(Window(), 50)
    with pytest.raises(TaskDoesNotFit, match="Needles: length = 49: expected at least 50 tokens"):
        task.inputs(Uniform.tokenizer, 49)


def test_forced_scores_by_hand():
    """Records "ab:7 ": after the pair has stood once, the four bytes before a value tell it; the first value is unknown."""
    task = Retrieval(name="records", generator=Records(pairs=4), examples_each=5)
    rows = {row["metric"]: row for row in task.measure(Copier(), 40)}
    assert rows["exact"]["count"] == 20
    examples = [Records(pairs=4).example(Copier.tokenizer, 40, i, seed=0, split="test") for i in range(5)]
    hits = []
    for ids, answers, *_ in examples:
        for start, _ in answers:
            hits.append(Copier()._next(ids[:start].tolist()) == ids[start])
    assert rows["exact"]["value"] == pytest.approx(np.mean(hits))
    assert rows["nll"]["value"] == pytest.approx(2 * (1 - np.mean(hits)))


def test_tasks_refuse_what_does_not_fit():
    with pytest.raises(TaskDoesNotFit):
        Retrieval(name="needle", generator=Needles()).measure(Uniform(), 20)
    with pytest.raises(SpecError, match=r"depths = \(0\.5,\): expected none: the answers of Records"):
        Retrieval(name="records", generator=Records(), depths=(0.5,))
    with pytest.raises(SpecError, match=r"depths = \(1\.5,\)"):
        Retrieval(name="needle", generator=Needles(), depths=(1.5,))
    with pytest.raises(SpecError, match=r"depths = \(0.5, 0.5\): expected distinct numbers"):
        Retrieval(name="needle", generator=Needles(), depths=(0.5, 0.5))


def test_intervals_are_bootstrap_and_deterministic():
    task = Retrieval(name="x", generator=Needles())
    values = np.asarray([0.0, 1.0] * 50)
    first, again = (task.row("exact", 8, values) for _ in range(2))
    assert first == again and first["value"] == 0.5
    assert 0.38 < first["low"] < 0.43 and 0.57 < first["high"] < 0.62  # 0.5 -+ 1.96 * 0.05
    weighted = task.row("exact", 8, [0.0, 1.0], [3, 1])
    assert weighted["value"] == 0.25 and (weighted["count"], weighted["examples"]) == (4, 2)


def test_a_broken_model_is_not_averaged_away():
    class Broken(Uniform):
        def logprobs(self, rows, starts, *, placed=None):
            scored = super().logprobs(rows, starts)
            scored[1].logprobs[0] = np.nan
            return scored

        def generate(self, prompts, max_new, *, placed=None):
            made = super().generate(prompts, max_new)
            return [*made[:-1], made[-1]._replace(logprobs=[0.0, np.nan])]

    for mode, said in (
        ("teacher_forced", "needle at 150, nll: 1 of 4 examples are not finite"),
        ("greedy", "of the answer = nan"),
    ):
        task = Retrieval(name="needle", generator=Needles(needles=2, queries=2), examples_each=4, mode=mode)
        with pytest.raises(NotFinite, match=f"{said}: expected finite numbers; the weights hold some that are not"):
            task.measure(Broken(), 150)
