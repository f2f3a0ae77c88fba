"""Evaluation: tasks at lengths, measured on the trained model of a run folder, as one resumable run.

Every finished measurement is a few rows of `results.jsonl`, each with the step, the experiment and the parameters it was taken
from; what is there already is not measured again, and rows of another model are refused. Ends in `table.md`, and a heatmap for
each task that has depths.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lcx.evaluation.checks import (
    Edits,
    check_inputs,
    check_lengths,
    check_names,
    check_parameters,
    digest,
    trained_experiment,
    used,
)
from lcx.evaluation.report import append_rows, caption, heatmap, read_rows, select, table, with_interval
from lcx.evaluation.tasks.task import Row, Task
from lcx.inference.language_model import LocalModel
from lcx.spec import Spec, SpecError, fingerprint
from lcx.training.checkpoint import latest, load_model
from lcx.training.experiment import Experiment
from lcx.training.run_folder import open_run
from lcx.training.shipped import run_folder

_NUMBERS = ("value", "low", "high", "count", "examples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Spec):
    """model: a run folder, or the name of a shipped model. edits: of its model (`("model.rope", YaRN(...))`) or its
    `data.tokenizer`: the parameters under another spec. step: the checkpoint, default the newest. tasks: each measured at
    every one of `lengths`. chunk: tokens of a prompt that are read at a time, behind each of which a cache may drop some.
    """

    model: str
    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    edits: Edits = ()
    step: int | None = None
    chunk: int = 512

    def validate(self):
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        check_names(self, "tasks", [task.name for task in self.tasks])
        check_lengths(self, self.lengths)

    def experiment(self) -> Experiment:
        """The experiment of `model`, edited. Raises SpecError if there is none, or for an edit as `used` and
        `check_parameters`."""
        trained = trained_experiment(self.model)
        changed = used(trained, self.edits, "Evaluation.edits")
        check_parameters(trained, changed, "Evaluation.edits")
        return changed


def evaluate(evaluation: Evaluation, run_dir: Path | str, say: Callable[[str], None] = print) -> list[Row]:
    """Measures what is not there yet in a run folder, writes the report, returns all rows.

    Before anything is written, raises SpecError if there is no such checkpoint, it does not fit the edits, or the folder is of
    another evaluation or holds rows of another model, and a task's own error if it does not fit a length.
    """
    run_dir = Path(run_dir)
    results = run_dir / "results.jsonl"
    experiment = evaluation.experiment()
    folder = run_folder(evaluation.model)
    step = latest(folder) if evaluation.step is None else evaluation.step
    model = load_model(folder, experiment.model, step=step)
    label = {"model": evaluation.model, "step": step}
    label |= {"experiment": fingerprint(trained_experiment(evaluation.model)), "parameters": digest(model)}
    rows = read_rows(results)
    _check_rows(rows, label, results)
    done = {(row["task"], row["length"]) for row in rows}
    jobs = [(task, length) for task in evaluation.tasks for length in evaluation.lengths]
    jobs = [(task, length) for task, length in jobs if (task.name, length) not in done]
    check_inputs((experiment.data.tokenizer, *job) for job in jobs)
    open_run(run_dir, evaluation)
    for task, length in jobs:
        found = task.measure(LocalModel(model, experiment.data.tokenizer, window=length, chunk=evaluation.chunk), length)
        append_rows(results, [label | row for row in found])
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


def _check_rows(rows: list[Row], label: dict[str, str | int], results: Path) -> None:
    for row in rows:
        for name in ("step", "experiment", "parameters"):
            if row.get(name) != label[name]:
                sides = f"rows of {row.get('model')} with {name} {row.get(name)}, {label['model']} has {label[name]}"
                raise SpecError(f"{results} holds {sides}: another model, or trained again or further; give another --run_dir")


def _name(row: Row) -> str:
    """What tells a row from the others of its task, metric and length."""
    plain = ("model", "step", "experiment", "parameters", "task", "metric", "length", *_NUMBERS)
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in plain) or "all"
