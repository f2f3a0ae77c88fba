"""Ablation: a base experiment and named edits of it, trained once an arm, measured in every variant, as one resumable run.

An arm is another training run, or a model that is there already; a variant is another way to use an arm's parameters: an edit
of its model, with or without some steps of fine-tuning. Every finished measurement is a few rows of `results.jsonl`; what is
already there is not done again, and rows of parameters that are no longer the ones in the folder are refused. Ends in
`table.md` and plots; `time.json` holds the time of every start, `models.json` what identifies the models that arms name.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from lcx.config_text import first_difference
from lcx.evaluation.checks import (
    Edits,
    check_inputs,
    check_lengths,
    check_names,
    digest,
    edited,
    trained_experiment,
    used,
)
from lcx.evaluation.panels import Panel, report
from lcx.evaluation.report import append_rows, read_rows
from lcx.evaluation.stopwatch import Stopwatch
from lcx.evaluation.tasks.task import Row, Task
from lcx.inference.language_model import LocalModel
from lcx.models.decoder import Decoder
from lcx.spec import Spec, SpecError, fingerprint
from lcx.training.checkpoint import latest, load_model
from lcx.training.experiment import Experiment
from lcx.training.loop import train
from lcx.training.run_folder import CONFIG, check_config, check_not_shipped, open_run, read_config
from lcx.training.shipped import run_folder
from lcx.training.step import abstract_model
from lcx.training.trainable import added_paths, trained_paths


class Stopped(Exception):
    """A training run was told to stop, and has saved a checkpoint to go on from. The message is one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(Spec):
    """A trained model: the base experiment with these edits, trained here; or, where `model` names a run folder or a shipped
    model, that one as it stands, with edits of its model or `data.tokenizer`.
    """

    name: str
    edits: Edits = ()
    model: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(Spec):
    """A way to use an arm's parameters. stage and scale only tell variants of one method apart in tables and plots.

    edits: of the arm's model or `data.tokenizer`. lengths: to measure at. chunk: tokens of a prompt that are read at a time,
    behind each of which a cache may drop some. finetune: edits that turn the arm's experiment into a
    fine-tuning from its parameters (steps, length, learning rate); empty: zero-shot. What it edits of the model holds for the
    training: measured is what `edits` say.
    """

    method: str
    lengths: tuple[int, ...]
    edits: Edits = ()
    stage: str = "zero-shot"
    scale: float = 1.0
    chunk: int = 512
    finetune: Edits = ()

    def validate(self):
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        check_lengths(self, self.lengths)

    @property
    def name(self) -> str:
        return f"{self.stage} {self.method} x{self.scale:g}"

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation(Spec):
    """base, arms, variants: see above; None where every arm names its model. tasks: measured in every variant at every length
    of it. panels: what is reported.
    """

    base: Experiment | None = None
    arms: tuple[Arm, ...]
    variants: tuple[Variant, ...]
    tasks: tuple[Task, ...]
    panels: tuple[Panel, ...]

    def validate(self):
        for field, names in (
            ("arms", [arm.name for arm in self.arms]),
            ("variants", [variant.folder for variant in self.variants]),
            ("tasks", [task.name for task in self.tasks]),
            ("panels", [panel.title for panel in self.panels]),
        ):
            check_names(self, field, names, files=field != "panels")
        cells = [(v.stage, v.method, length) for v in self.variants for length in v.lengths]
        if twice := [cell for cell in cells if cells.count(cell) > 1]:
            self.fail("variants", twice[0], "stage, method and length to name one variant, since tables show them")
        for panel in self.panels:
            panel.check_against(self.tasks)
        trained_here = [arm.name for arm in self.arms if arm.model is None]
        wanted = f"an Experiment for {trained_here[0]!r} to train" if trained_here else "None: every arm names its model"
        self.check((self.base is not None) == bool(trained_here), "base", wanted)
        for arm in self.arms:
            for variant in self.variants if arm.model is None else ():  # a named model may be read elsewhere, or later
                self.experiment(arm, variant)

    def experiment(self, arm: Arm, variant: Variant | None = None) -> Experiment:
        """The experiment of an arm, or of a variant of it. Raises SpecError if an edit is impossible, is of a rope that no
        layer reads or, in a variant or of a named model, of what measuring does not read; and if there is no such model."""
        name = arm.name if variant is None else f"{arm.name}, {variant.name}"
        try:
            if arm.model is None:
                trained = edited(self.base, arm.edits)
            else:
                trained = used(trained_experiment(arm.model), arm.edits, "Arm.edits")
            if variant is None:
                return trained
            return edited(used(trained, variant.edits, "Variant.edits"), variant.finetune)
        except SpecError as error:
            raise SpecError(f"ablation, {name}: {error}") from None

    def measured(self, arm: Arm, variant: Variant) -> Experiment:
        """What a variant of an arm is measured under, however it was fine-tuned."""
        return self.experiment(arm, dataclasses.replace(variant, finetune=()))

    def identity(self) -> dict[str, str]:
        """What decides the rows. Panels only show them, so they may change between starts."""
        return {field: fingerprint(getattr(self, field)) for field in ("base", "arms", "variants", "tasks")}


def run(ablation: Ablation, run_dir: Path | str, say: Callable[[str], None] = print) -> list[Row]:
    """Trains, measures and reports what is not there yet; returns all rows. `say` gets progress and the time split.

    Before anything is trained or written, raises SpecError if the folder holds another config's rows or training runs, rows of
    other parameters than its training runs have, or a variant has other parameters than its arm, and the task's own error if
    one does not fit a length. Stopped if a training run was told to stop.
    """
    if jax.process_count() > 1:
        raise SpecError(f"ablation: {jax.process_count()} processes: expected one, which may have many devices")
    run_dir = Path(run_dir)
    with Stopwatch(run_dir / "time.json") as watch:
        return _Run(ablation, run_dir, say, watch).go()


class _Run:
    def __init__(self, ablation: Ablation, run_dir: Path, say: Callable[[str], None], watch: Stopwatch):
        self.ablation, self.run_dir, self.say, self.watch = ablation, run_dir, say, watch
        self.results = run_dir / "results.jsonl"
        self.key = fingerprint(ablation.identity())
        self.named = run_dir / "models.json"
        self.measured: dict[Path, set[str]] = {}  # parameters that rows stand on, by the folder that holds them

    def go(self) -> list[Row]:
        check_config(self.run_dir, self.ablation)
        todo = self._todo()
        self._check(todo)
        open_run(self.run_dir, self.ablation)
        self._remember_named()
        for arm, variant, jobs in todo:
            self._measure(arm, variant, jobs)
        rows = read_rows(self.results)
        ablation = self.ablation
        names = [arm.name for arm in ablation.arms]
        report(self.run_dir, rows, arms=names, tasks=ablation.tasks, panels=ablation.panels)
        for line in self.watch.lines():
            self.say(line)
        return rows

    def _todo(self) -> list[tuple[Arm, Variant, list[tuple[Task, int]]]]:
        rows = read_rows(self.results)
        if other := {row["config"] for row in rows} - {self.key}:
            raise SpecError(
                f"{self.results} holds rows of config {other.pop()}, this one is {self.key}: give another --run_dir"
            )
        folders = {(arm.name, v.name): self._folder(arm, v) for arm in self.ablation.arms for v in self.ablation.variants}
        for row in rows:
            self.measured.setdefault(folders[row["arm"], row["variant"]], set()).add(row.get("parameters", "unknown"))
        done = {(row["arm"], row["variant"], row["task"], row["length"]) for row in rows}
        todo = []
        for arm in self.ablation.arms:
            for variant in self.ablation.variants:
                jobs = [(task, n) for task in self.ablation.tasks for n in variant.lengths]
                jobs = [(task, n) for task, n in jobs if (arm.name, variant.name, task.name, n) not in done]
                todo += [(arm, variant, jobs)] if jobs else []
        return todo

    def _check(self, todo: list[tuple[Arm, Variant, list[tuple[Task, int]]]]) -> None:
        """Finds what cannot be measured before anything is trained for it."""
        for arm, variant, _ in todo:
            trained, used = self.ablation.experiment(arm), self.ablation.experiment(arm, variant)
            self._check_folder(trained, self.run_dir / arm.name)
            if variant.finetune:
                check_not_shipped(self._folder(arm, variant))
            mine, theirs = _parameters(trained.model), _parameters(used.model)
            new = added_paths(_state_of(used.model)) - set(mine) if variant.finetune else ()
            if differing := sorted(str(path) for path, _ in mine.items() ^ theirs.items() if path not in new):
                raise SpecError(f"ablation, {arm.name}, {variant.name}: other parameters than the arm's: {differing[0]}")
            read = _parameters(self.ablation.measured(arm, variant).model)
            if differing := sorted(str(path) for path, _ in read.items() ^ theirs.items()):
                expected = f"{differing[0]} in `edits` as in `finetune`, since what is trained is measured"
                raise SpecError(f"ablation, {arm.name}, {variant.name}: expected {expected}")
            if used.trainable is not None:
                trained_paths(_state_of(used.model), used.trainable)
        for arm in self.ablation.arms:
            self._check_named(arm)
        self._check_rows()
        tokenizer = lambda arm, variant: self.ablation.experiment(arm, variant).data.tokenizer
        check_inputs((tokenizer(arm, variant), *job) for arm, variant, jobs in todo for job in jobs)

    def _check_named(self, arm: Arm) -> None:
        """A named model is what it was at the first start."""
        held = json.loads(self.named.read_text()) if self.named.exists() else {}
        if arm.model is not None and (found := self._state(arm)) != held.get(arm.name, found):
            changed = ", ".join(name for name, value in found.items() if value != held[arm.name].get(name))
            sides = f"{changed} of model {arm.model!r} changed since the first start"
            raise SpecError(f"ablation, {arm.name}: {sides}; restore it, or give another --run_dir")

    def _remember_named(self) -> None:
        found = {arm.name: self._state(arm) for arm in self.ablation.arms if arm.model is not None}
        if found and not self.named.exists():
            self.named.write_text(json.dumps(found, indent=1) + "\n")

    def _state(self, arm: Arm) -> dict[str, str]:
        """What identifies the model that an arm names."""
        model = load_model(run_folder(arm.model), self.ablation.experiment(arm).model)
        return {"experiment": fingerprint(trained_experiment(arm.model)), "parameters": digest(model)}

    def _check_rows(self) -> None:
        """Rows are of the parameters that their folders hold, where these are still there."""
        pairs = [(arm, variant) for arm in self.ablation.arms for variant in self.ablation.variants]
        named = {run_folder(arm.model) for arm in self.ablation.arms if arm.model is not None}
        for folder, experiment in {self._folder(*pair): self.ablation.experiment(*pair) for pair in pairs}.items():
            if folder in self.measured and (folder in named or _trained(folder, experiment)):
                self._check_measured(folder, load_model(folder, experiment.model))

    def _check_measured(self, folder: Path, model: nnx.Module) -> None:
        found = digest(model)
        if other := self.measured.get(folder, set()) - {found}:
            sides = f"rows of parameters {other.pop()} of {folder}, which now holds {found}"
            raise SpecError(f"{self.results} holds {sides}: it was trained again; give another --run_dir")

    def _check_folder(self, experiment: Experiment, folder: Path) -> None:
        check_not_shipped(folder)
        if (folder / CONFIG).is_file():
            held, wanted = (dataclasses.replace(spec, init_from=None) for spec in (read_config(folder), experiment))
            if changed := first_difference(held, wanted):
                raise SpecError(f"{folder} was trained with another config, first in {changed}: give another --run_dir")

    def _measure(self, arm: Arm, variant: Variant, jobs: list[tuple[Task, int]]) -> None:
        model = self._model(arm, variant)
        parameters = digest(model)
        tokenizer = self.ablation.experiment(arm, variant).data.tokenizer
        for task, length in jobs:
            begin = time.perf_counter()
            with self.watch.on(arm.name, "evaluate"):
                rows = task.measure(LocalModel(model, tokenizer, window=length, chunk=variant.chunk), length)
            took = time.perf_counter() - begin
            label = {"arm": arm.name, "variant": variant.name, "method": variant.method, "stage": variant.stage}
            label |= {"scale": variant.scale, "config": self.key, "parameters": parameters}
            label |= {"seconds": round(took, 3)}
            append_rows(self.results, [label | row for row in rows])
            self.say(f"{arm.name}, {variant.name}, {task.name} at {length}: {took:.1f} s")

    def _model(self, arm: Arm, variant: Variant) -> nnx.Module:
        """The arm's parameters under the variant's spec, trained or fine-tuned first where they are not yet."""
        folder, experiment = self._arm_folder(arm), self.ablation.experiment(arm, variant)
        if arm.model is None:
            self._train(self.ablation.experiment(arm), folder, arm, "train")
        self._check_named(arm)
        if variant.finetune:
            experiment = dataclasses.replace(experiment, init_from=arm.model or str(folder))
            folder = self._folder(arm, variant)
            self._train(experiment, folder, arm, "fine-tune")
        return load_model(folder, self.ablation.measured(arm, variant).model)

    def _folder(self, arm: Arm, variant: Variant) -> Path:
        """Where the parameters of a variant are."""
        return self.run_dir / arm.name / variant.folder if variant.finetune else self._arm_folder(arm)

    def _arm_folder(self, arm: Arm) -> Path:
        return self.run_dir / arm.name if arm.model is None else run_folder(arm.model)

    def _train(self, experiment: Experiment, folder: Path, arm: Arm, kind: str) -> None:
        self._check_folder(experiment, folder)
        if _trained(folder, experiment):
            return
        self.say(f"{kind} {folder.name}: {experiment.steps} steps")
        with self.watch.on(arm.name, kind):
            result = train(experiment, folder)
        if result.status != "completed":
            raise Stopped(f"{folder}: saved at step {result.step}; start again to go on")
        self._check_measured(folder, result.model)


def _trained(folder: Path, experiment: Experiment) -> bool:
    return (folder / CONFIG).is_file() and latest(folder) == experiment.steps


@functools.cache
def _state_of(model: Decoder) -> nnx.State:
    return abstract_model(model)[1]


@functools.cache
def _parameters(model: Decoder) -> dict[tuple, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in nnx.to_flat_state(_state_of(model))}
