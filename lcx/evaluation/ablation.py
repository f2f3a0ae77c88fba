"""Ablation: a base experiment and named edits of it, trained once an arm, measured in every variant, as one resumable run.

An arm is another training run; a variant is another way to use an arm's parameters: an edit of its experiment, with or
without some steps of fine-tuning. Every finished measurement is a few rows of `results.jsonl`; what is already there is not
done again. Ends in `table.md` and plots.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcx.evaluation.report import append_rows, heatmap, lines_plot, read_rows, select, table, with_interval
from lcx.evaluation.tasks.task import Row, Task
from lcx.inference.language_model import LocalModel
from lcx.spec import Spec, SpecError, edits, fingerprint
from lcx.training.checkpoint import latest, load_model
from lcx.training.experiment import Experiment
from lcx.training.loop import train

Edits = tuple[tuple[str, Any], ...]  # (path, value) pairs, applied in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(Spec):
    """A training run: the base experiment with these edits."""

    name: str
    edits: Edits = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(Spec):
    """A way to use an arm's parameters. stage and scale only tell variants of one method apart in tables and plots.

    edits: of the arm's experiment. lengths: to measure at. finetune: edits that turn it into a fine-tuning experiment from the
    arm's parameters (steps, length, learning rate); empty: zero-shot.
    """

    method: str
    lengths: tuple[int, ...]
    edits: Edits = ()
    stage: str = "zero-shot"
    scale: float = 1.0
    finetune: Edits = ()

    def validate(self):
        self.check(len(self.lengths) >= 1, "lengths", "at least one length")

    @property
    def name(self) -> str:
        return f"{self.stage} {self.method} x{self.scale:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel(Spec):
    """One table and one plot: a metric of a task; `where` fixes further fields of its rows (bucket, mode)."""

    title: str
    task: str
    metric: str
    where: tuple[tuple[str, Any], ...] = ()
    accuracy: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation(Spec):
    """base, arms, variants: see above. tasks: measured in every variant at every length of it. panels: what is reported."""

    base: Experiment
    arms: tuple[Arm, ...]
    variants: tuple[Variant, ...]
    tasks: tuple[Task, ...]
    panels: tuple[Panel, ...]

    def validate(self):
        for field, names in (
            ("arms", [arm.name for arm in self.arms]),
            ("variants", [variant.name for variant in self.variants]),
            ("tasks", [task.name for task in self.tasks]),
        ):
            self.check(len(names) >= 1 and len(set(names)) == len(names), field, f"distinct names, at least one; got {names}")
        for panel in self.panels:
            if panel.task not in {task.name for task in self.tasks}:
                panel.fail("task", panel.task, f"one of {', '.join(task.name for task in self.tasks)}")
        for arm in self.arms:
            for variant in self.variants:
                self.experiment(arm, variant)

    def experiment(self, arm: Arm, variant: Variant | None = None) -> Experiment:
        """The experiment of an arm, or of a variant of it. Raises SpecError if an edit is impossible."""
        changes = (*arm.edits, *((*variant.edits, *variant.finetune) if variant else ()))
        try:
            return edits(self.base, changes)
        except SpecError as error:
            name = arm.name if variant is None else f"{arm.name}, {variant.name}"
            raise SpecError(f"ablation, {name}: {error}") from None


def run(ablation: Ablation, run_dir: Path | str, say: Callable[[str], None] = print) -> list[Row]:
    """Trains, measures and reports what is not there yet; returns all rows. `say` gets progress and the time split.

    Raises SpecError if results.jsonl holds rows of another config; RuntimeError if a training run was told to stop.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    return _Run(ablation, run_dir, say).go()


class _Run:
    def __init__(self, ablation: Ablation, run_dir: Path, say: Callable[[str], None]):
        self.ablation, self.run_dir, self.say = ablation, run_dir, say
        self.results = run_dir / "results.jsonl"
        self.key = fingerprint(ablation)
        self.seconds: dict[str, float] = {"train": 0.0, "fine-tune": 0.0, "evaluate": 0.0}

    def go(self) -> list[Row]:
        rows = read_rows(self.results)
        if other := {row["config"] for row in rows} - {self.key}:
            raise SpecError(
                f"{self.results} holds rows of config {other.pop()}, this one is {self.key}: give another --run_dir"
            )
        done = {(row["arm"], row["variant"], row["task"], row["length"]) for row in rows}
        for arm in self.ablation.arms:
            for variant in self.ablation.variants:
                jobs = [(task, n) for task in self.ablation.tasks for n in variant.lengths]
                jobs = [(task, n) for task, n in jobs if (arm.name, variant.name, task.name, n) not in done]
                if jobs:
                    self._measure(arm, variant, jobs)
        rows = read_rows(self.results)
        report(self.ablation, rows, self.run_dir)
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        self.say(f"time: {spent}")
        return rows

    def _measure(self, arm: Arm, variant: Variant, jobs: list[tuple[Task, int]]) -> None:
        model = self._model(arm, variant)
        tokenizer = self.ablation.base.data.tokenizer
        for task, length in jobs:
            begin = time.perf_counter()
            rows = task.measure(LocalModel(model, tokenizer, window=length), length)
            took = time.perf_counter() - begin
            self.seconds["evaluate"] += took
            label = {"arm": arm.name, "variant": variant.name, "method": variant.method, "stage": variant.stage}
            label |= {"scale": variant.scale, "config": self.key, "seconds": round(took, 3)}
            append_rows(self.results, [label | row for row in rows])
            self.say(f"{arm.name}, {variant.name}, {task.name} at {length}: {took:.1f} s")

    def _model(self, arm: Arm, variant: Variant):
        """The arm's parameters under the variant's spec, trained or fine-tuned first where they are not yet."""
        base, experiment = self.run_dir / arm.name, self.ablation.experiment(arm, variant)
        self._train(self.ablation.experiment(arm), base, "train")
        if not variant.finetune:
            return load_model(base, experiment.model)
        folder = self.run_dir / arm.name / variant.name.replace(" ", "-")
        self._train(dataclasses.replace(experiment, init_from=str(base)), folder, "fine-tune")
        return load_model(folder, experiment.model)

    def _train(self, experiment: Experiment, folder: Path, kind: str) -> None:
        if latest(folder) == experiment.steps:
            return
        self.say(f"{kind} {folder.name}: {experiment.steps} steps")
        begin = time.perf_counter()
        result = train(experiment, folder)
        self.seconds[kind] += time.perf_counter() - begin
        if result.status != "completed":
            raise RuntimeError(f"{folder}: training was told to stop at step {result.step}; start again to go on")


def report(ablation: Ablation, rows: list[Row], run_dir: Path) -> None:
    """Writes table.md, and for every arm a plot over lengths and, where a task has depths, heatmaps."""
    text = []
    for arm in ablation.arms:
        panels: dict[str, list[Row]] = {}
        for panel in ablation.panels:
            found = select(rows, arm=arm.name, task=panel.task, metric=panel.metric, **dict(panel.where))
            text.append(f"### {arm.name}: {panel.title}\n")
            for stage in dict.fromkeys(row["stage"] for row in found):
                text += [
                    f"{stage}, by length in tokens:\n",
                    table(select(found, stage=stage), "method", "length", with_interval),
                    "",
                ]
            zero_shot = select(found, stage=found[0]["stage"]) if found else []
            if zero_shot:
                panels[panel.title] = zero_shot
        if panels:
            labels = {"x": "length (tokens)", "y": ""}
            lines_plot(run_dir / f"{arm.name}.png", panels, series="method", x="length", labels=labels)
        for task in ablation.tasks:
            mapped = [row for row in select(rows, arm=arm.name, task=task.name, metric="exact") if "depth" in row]
            for variant in dict.fromkeys(row["variant"] for row in mapped):
                path = run_dir / f"{arm.name}-{task.name}-{variant.replace(' ', '-')}.png"
                heatmap(path, select(mapped, variant=variant), title=f"{task.name}: {arm.name}, {variant}")
    (run_dir / "table.md").write_text("\n".join(text))
