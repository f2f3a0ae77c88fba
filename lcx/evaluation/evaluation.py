"""Evaluation: tasks at lengths, measured on the trained model of a run folder, as one resumable run.

Every finished measurement is a few rows of `results.jsonl`, each with the checkpoint it was taken from; what is there already
is not measured again. Ends in `table.md`, and a heatmap for each task that has depths.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcx.evaluation.report import append_rows, caption, heatmap, read_rows, select, table, with_interval
from lcx.evaluation.tasks.task import Row, Task
from lcx.inference.language_model import LocalModel
from lcx.spec import Spec, SpecError, edits
from lcx.training.checkpoint import latest, load_model
from lcx.training.experiment import Experiment
from lcx.training.run_folder import read_config
from lcx.training.shipped import run_folder

_NUMBERS = ("value", "low", "high", "count", "examples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Spec):
    """model: a run folder, or the name of a shipped model. edits: of its experiment (`("model.rope", YaRN(...))`): the
    parameters under another spec. step: the checkpoint, default the newest. tasks: each measured at every one of `lengths`.
    """

    model: str
    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    edits: tuple[tuple[str, Any], ...] = ()
    step: int | None = None

    def validate(self):
        names = [task.name for task in self.tasks]
        self.check(len(names) >= 1 and len(set(names)) == len(names), "tasks", f"distinct names, at least one; got {names}")
        self.check(len(self.lengths) >= 1 and min(self.lengths) >= 1, "lengths", "at least one length of at least 1 token")

    def experiment(self) -> Experiment:
        """The experiment of the run folder, edited. Raises SpecError if the folder holds none, or an edit is impossible."""
        trained = read_config(run_folder(self.model))
        if not isinstance(trained, Experiment):
            self.fail("model", self.model, f"the folder of a training run; its config is of type {type(trained).__name__}")
        return edits(trained, self.edits)


def evaluate(evaluation: Evaluation, run_dir: Path | str, say: Callable[[str], None] = print) -> list[Row]:
    """Measures what is not there yet, writes the report, returns all rows. Raises SpecError if there is no such checkpoint."""
    run_dir = Path(run_dir)
    results = run_dir / "results.jsonl"
    experiment = evaluation.experiment()
    folder = run_folder(evaluation.model)
    step = latest(folder) if evaluation.step is None else evaluation.step
    rows = read_rows(results)
    if other := {row["step"] for row in rows} - {step}:
        raise SpecError(f"{results} holds rows of step {other.pop()}, the model is at step {step}: give another --run_dir")
    done = {(row["task"], row["length"]) for row in rows}
    jobs = [(task, length) for task in evaluation.tasks for length in evaluation.lengths]
    jobs = [(task, length) for task, length in jobs if (task.name, length) not in done]
    model = load_model(folder, experiment.model, step=step) if jobs else None
    for task, length in jobs:
        found = task.measure(LocalModel(model, experiment.data.tokenizer, window=length), length)
        append_rows(results, [{"model": evaluation.model, "step": step} | row for row in found])
        say(f"{task.name} at {length}")
    rows = read_rows(results)
    report(rows, run_dir)
    return rows


def report(rows: list[Row], run_dir: Path) -> None:
    """Writes table.md, one table a task and metric, and a heatmap a task with depths."""
    text = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        found = select(rows, task=task, metric=metric)
        named = [row | {task: _name(row)} for row in found]
        text += [f"### {task}, {metric}\n", f"{caption(found)}:\n", table(named, task, "length", with_interval), ""]
        if metric == "exact" and all("depth" in row for row in found):
            heatmap(run_dir / f"{task}.png", found, title=task)
    (run_dir / "table.md").write_text("\n".join(text))


def _name(row: Row) -> str:
    """What tells a row from the others of its task, metric and length."""
    plain = ("model", "step", "task", "metric", "length", *_NUMBERS)
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in plain) or "all"
