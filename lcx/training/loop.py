"""The training loop: resume, step, log, save, stop.

A run lives in a folder: its config (run_folder.py), `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and `data.json` (tokens
kept, split, padded and dropped; bytes and checksum of every source). Calling `train` again with the same folder goes on from
the newest checkpoint, to the same parameters, bit for bit on a CPU, as a run that was never interrupted. A start that is
refused leaves what the folder holds as it was.
"""

import contextlib
import dataclasses
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jax.experimental import multihost_utils

from lcx.data.sources import contents
from lcx.spec import SpecError
from lcx.training.checkpoint import Checkpoints, restore_params
from lcx.training.experiment import Experiment
from lcx.training.flops import counter
from lcx.training.metrics import Meter, Pending
from lcx.training.placement import host_rows, place_batch
from lcx.training.run_folder import check_config, claim, read_trained, record_start
from lcx.training.shipped import run_folder
from lcx.training.step import TrainState, TrainStep, abstract_model
from lcx.training.trainable import added_paths, joined, parted
from lcx.training.writers import JsonLines, Record, TensorBoard, Writer, read_records, terminal

METRICS, DATA = "metrics.jsonl", "data.json"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """model: with the last parameters. step: updates made. metrics: the last record. status: `completed`, or `terminated` by
    SIGTERM after saving.
    """

    model: nnx.Module
    step: int
    metrics: Record
    status: Literal["completed", "terminated"]

    @property
    def exit_status(self) -> int:
        """0 if the run is complete; 143 (128 + SIGTERM) if it was told to stop and wants to be started again."""
        return 0 if self.status == "completed" else 128 + signal.SIGTERM


def train(experiment: Experiment, run_dir: Path | str, *, devices: Sequence[jax.Device] | None = None) -> TrainResult:
    """Trains, or goes on training, in `run_dir`, on `devices` (default: all, as many as the mesh needs).

    Before it changes what the folder holds, raises SpecError if the config does not fit the devices, the folder or its newest
    checkpoint, the data are others than those it began with, or another process trains in the folder, and SourceError if the
    data cannot be read. Later TrainingDiverged at a non-finite loss, gradient or parameter; ValueError if a batch has no loss
    weight or the data end early.
    """
    run_dir = Path(run_dir).absolute()
    check_config(run_dir, experiment)
    mesh = experiment.mesh.build(devices)
    host, hosts = host_rows(experiment.data.batch_size, experiment.model.rules, mesh)
    step = experiment.training_step(mesh)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_Stop())
        stack.enter_context(claim(run_dir))
        checkpoints = stack.enter_context(Checkpoints(run_dir, experiment.checkpoint))
        newest = checkpoints.latest()
        if newest is not None:
            experiment.check_continues(checkpoints.meta(newest), run_dir)
        _records(run_dir)
        sets = experiment.data.row_sets()
        counts = contents(experiment.data, "data") | experiment.data.counts(sets)
        if newest is not None:
            _check_data(run_dir / DATA, counts)
        batches = iter(experiment.data.dataset(host=host, hosts=hosts, sets=sets))
        state = _begin(experiment, step, checkpoints, newest, batches)
        if jax.process_index() == 0:
            record_start(run_dir, experiment)
            if newest is None or not (run_dir / DATA).exists():
                (run_dir / DATA).write_text(json.dumps(counts, indent=1) + "\n")
            if newest is not None:
                _log.info("resumed at step %d", newest)
        tokens = 0 if newest is None else checkpoints.meta(newest).get("tokens")
        run = _Run(experiment, step, checkpoints, batches, hosts, run_dir, tokens)
        return run.go(state, newest or 0, stop, stack)


class _Run:
    """One process's part of a run, from a state on."""

    def __init__(
        self,
        experiment: Experiment,
        step: TrainStep,
        checkpoints: Checkpoints,
        batches: Iterator,
        hosts: int,
        run_dir: Path,
        tokens: int | None,
    ):
        self.experiment, self.step, self.checkpoints = experiment, step, checkpoints
        self.batches, self.hosts, self.run_dir = batches, hosts, run_dir
        self.tokens = tokens  # of the run so far, where they were counted
        self.counter = counter(experiment.model, step.abstract, step.trained, experiment.objective.drawn_ratios)
        self.shards = math.prod(step.mesh.shape[axis] for axis in experiment.model.rules.sequence)

    def go(self, state: TrainState, start: int, stop: "_Stop", stack: contextlib.ExitStack) -> TrainResult:
        experiment, number, meter = self.experiment, start, None
        for number in range(start + 1, experiment.steps + 1):
            batch = self._next(number)
            laid = experiment.layout.lay(batch, self.shards)
            placed = place_batch(laid, experiment.model.rules, self.step.mesh, hosts=self.hosts)
            if meter is None:
                compiled, first = self._compile(placed)
                meter = self._meter(start, first, stack)
            state, results = compiled(state, placed)
            work = self.counter.masked(batch.info), self.counter.full(*batch.shape)
            meter.add(Pending(number, results, *work))
            stopping = stop.requested(number)
            if stopping or number == experiment.steps or experiment.checkpoint.due(number):
                meter.finish()
                self._save(state, number, meter.tokens)
            if stopping:
                break
        if meter is not None:
            meter.finish()
        status = "completed" if number == experiment.steps else "terminated"
        return TrainResult(self.step.model(state.params), number, self._last_record() if meter is None else meter.last, status)

    def _next(self, number: int):
        try:
            return next(self.batches)
        except StopIteration:
            raise ValueError(
                f"step {number} of {self.experiment.steps}: the data have ended; repeat them or train fewer steps"
            ) from None

    def _compile(self, batch) -> tuple[Any, Record]:
        begin = time.perf_counter()
        compiled = self.step.compile(batch)
        first: Record = {"compile_seconds": time.perf_counter() - begin}
        if (planned := compiled.memory_analysis()) is not None:
            first["compiled_argument_bytes"] = planned.argument_size_in_bytes
            first["compiled_temporary_bytes"] = planned.temp_size_in_bytes
        return compiled, first

    def _meter(self, start: int, first: Record, stack: contextlib.ExitStack) -> Meter:
        writers: list[Writer] = []
        if jax.process_index() == 0:
            writers = [
                JsonLines(self.run_dir / METRICS, step=start),
                TensorBoard(self.run_dir / "tensorboard", step=start),
                terminal(step=start, steps=self.experiment.steps),
            ]
        for writer in writers:
            stack.callback(writer.close)
        return Meter(
            log_every=self.experiment.log_every,
            report=self.experiment.objective.report,
            counter=self.counter,
            devices=self.step.mesh.devices.flatten().tolist(),
            hosts=self.hosts,
            writers=writers,
            last_good=self.checkpoints.latest,
            first=first,
            tokens=self.tokens,
        )

    def _last_record(self) -> Record:
        """What an earlier process wrote last."""
        records = _records(self.run_dir)
        return records[-1] if records else {}

    def _save(self, state: TrainState, number: int, tokens: int | None) -> None:
        meta = {"steps": self.experiment.steps, "identity": self.experiment.identity()}
        meta["tokens"] = tokens
        meta["init_from"] = self.experiment.origin(self.run_dir)
        self.checkpoints.save(state, step=number, data=self.batches.get_state(), meta=meta)


def _begin(
    experiment: Experiment, step: TrainStep, checkpoints: Checkpoints, newest: int | None, batches: Iterator
) -> TrainState:
    """The state to go on from, of checkpoint `newest` or a first one; the data are set to the batch that follows."""
    if newest is not None:
        state, data = checkpoints.restore(newest, step.abstract_state())
        batches.set_state(data)
        return state
    if experiment.init_from is not None:
        return step.start(_initial(experiment, step))
    return step.init()


def _initial(experiment: Experiment, step: TrainStep) -> Any:
    """The parameters of `init_from`; those that a method adds and that model has none of begin as they are built."""
    run_dir, target = run_folder(experiment.init_from), step.abstract_state().params
    added = added_paths(step.abstract)
    if added:
        held = nnx.to_flat_state(abstract_model(read_trained(run_dir).model)[1])
        added -= {path for path, _ in held}
    if not added:
        return restore_params(run_dir, target)
    return joined(step.built(added), restore_params(run_dir, parted(target, added)[1]))


def _check_data(path: Path, counts: dict[str, int]) -> None:
    """Raises SpecError if the run began with other data. What an earlier version did not count is not compared."""
    try:
        held = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise SpecError(f"{path}: not JSON: {error}; delete it to go on without comparing the data") from None
    for name, value in held.items():
        if counts.get(name) != value:
            raise SpecError(
                f"{path}: {name} is {counts.get(name)} now and was {value} when the run began: the data have changed; "
                "restore them, or start another run with init_from"
            )


def _records(run_dir: Path) -> list[Record]:
    path = run_dir / METRICS
    return read_records(path) if path.exists() else []


class _Stop:
    """Whether SIGTERM has asked the run to stop. With many processes all agree on the step; otherwise it is the next one."""

    def __enter__(self) -> "_Stop":
        self._asked = threading.Event()
        self._main = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
        if self._main:
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def requested(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()
