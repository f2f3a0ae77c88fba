"""Every task measures what it says, the same each time, and never cuts its examples to fit."""

import pytest
from flax import nnx

from configs.models import byte
from lcx.data.tokenizers import ByteTokenizer
from lcx.evaluation.tasks.task import Task
from lcx.inference.language_model import LocalModel, WindowOverflow
from lcx.parts import parts

LENGTH = 121
EXAMPLES = [(f"{cls.__name__}-{n}", spec) for cls in parts(Task) for n, spec in enumerate(cls.examples())]


def test_every_task_has_examples():
    assert all(cls.examples() for cls in parts(Task))


@pytest.fixture(scope="module")
def model():
    return LocalModel(byte.toy(width=32, layers=1).build(rngs=nnx.Rngs(0)), ByteTokenizer(), window=LENGTH)


@pytest.fixture(params=[spec for _, spec in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def task(request):
    return request.param


def test_rows_are_tidy_and_repeatable(task, model):
    rows = task.measure(model, LENGTH)
    assert {row["metric"] for row in rows} == set(task.metrics)
    numbers = ("value", "low", "high", "count", "examples")
    keys = [tuple((name, value) for name, value in row.items() if name not in numbers) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert (row["task"], row["length"]) == (task.name, LENGTH)
        assert row["low"] <= row["value"] <= row["high"] and 1 <= row["examples"] <= row["count"]
        if (bounds := task.metrics[row["metric"]].range) is not None:
            assert bounds[0] <= row["value"] <= bounds[1]
    assert task.measure(model, LENGTH) == rows


def test_what_does_not_fit_is_refused(task, model):
    with pytest.raises(ValueError, match=r"expected at (least|most)"):
        task.inputs(ByteTokenizer(), 3)
    with pytest.raises(WindowOverflow):
        task.measure(LocalModel(model.model, ByteTokenizer(), window=LENGTH // 2), LENGTH)
