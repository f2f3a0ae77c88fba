"""Metrics of a run: sums fetched from the devices with a delay, checked for non-finite values, made into one record a log step.

The host hands over a step's results unread. They are read when the next log step has been dispatched, so the devices
always have a step to work on while the host waits.
"""

import collections
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lcx.training.flops import Counter, Work, peak
from lcx.training.writers import Record, Writer


class TrainingDiverged(RuntimeError):
    """A loss, gradient or parameter is no longer finite. Attributes: step, and the step of the last good checkpoint or None."""

    def __init__(self, step: int, values: dict[str, float], checkpoint: int | None):
        self.step, self.checkpoint = step, checkpoint
        shown = ", ".join(f"{name} = {value}" for name, value in values.items())
        kept = "there is no checkpoint before it" if checkpoint is None else f"the last good checkpoint is of step {checkpoint}"
        super().__init__(f"training diverged at step {step}: {shown}; {kept}")


@dataclasses.dataclass(frozen=True)
class Pending:
    """A dispatched step: its number (1 after the first update), device results, and the work of its batch, both conventions."""

    step: int
    results: dict[str, Any]
    masked: Work
    full: Work


class Meter:
    """Collects the steps of a run and writes a record every `log_every` steps, and whenever `finish` is called.

    A record's `step` and `tokens_total` count from the start of the run, `steps_since_last` and `tokens_since_last` from the
    record before; tokens are those of documents, without padding.

    report: the objective's, from sums to figures. tokens: of the run so far; None, where an earlier version did not count them,
    leaves the total out. devices: all of the mesh. hosts: into how many groups the rows are split;
    the work given is that of one group.
    """

    def __init__(
        self,
        *,
        log_every: int,
        report: Callable[[dict[str, float]], dict[str, float]],
        counter: Counter,
        devices: Sequence[jax.Device],
        hosts: int,
        writers: Sequence[Writer],
        last_good: Callable[[], int | None],
        first: Record,
        tokens: int | None = 0,
    ):
        self._log_every, self._report, self._counter = log_every, report, counter
        self._devices, self._hosts, self._writers, self._last_good = devices, hosts, writers, last_good
        self._pending: collections.deque[Pending] = collections.deque()
        self._window: list[tuple[Pending, dict[str, Any]]] = []
        self._once = first
        self.tokens = tokens
        self._since = time.perf_counter()
        self.last: Record = {}

    def add(self, pending: Pending) -> None:
        """Takes a dispatched step; reads earlier ones if a log step is among them."""
        due = bool(self._pending) and self._pending[-1].step % self._log_every == 0
        if due:
            self.collect()
        self._pending.append(pending)

    def collect(self) -> None:
        """Reads all steps taken so far, waiting for the devices. Raises TrainingDiverged, or ValueError for no weight."""
        for results in jax.device_get([pending.results for pending in self._pending]):
            pending = self._pending.popleft()
            results = jax.tree.map(float, results)
            self._check(pending.step, results)
            self._window.append((pending, results))
            if pending.step % self._log_every == 0:
                self._emit()

    def finish(self) -> None:
        """Reads and writes what is left: before a checkpoint, so that no step's figures are lost with the process."""
        self.collect()
        if self._window:
            self._emit()

    def _check(self, step: int, results: dict[str, Any]) -> None:
        if results["sums"]["weight"] == 0:
            raise ValueError(f"step {step}: no token of the batch has a loss weight, so there is nothing to learn from")
        flat = results["sums"] | results["values"]
        bad = {name: value for name, value in flat.items() if not math.isfinite(value)}
        if bad:
            raise TrainingDiverged(step, bad, self._last_good())

    def _emit(self) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        steps, results = [pending for pending, _ in self._window], [results for _, results in self._window]
        self._window = []
        sums = {name: math.fsum(r["sums"][name] for r in results) for name in results[0]["sums"]}
        values = dict(results[-1]["values"])
        values["gradient_norm"] = math.fsum(r["values"]["gradient_norm"] for r in results) / len(results)
        record: Record = {"step": steps[-1].step, "steps_since_last": len(steps)} | self._report(sums) | values
        record |= self._speed(steps, seconds) | memory(self._devices) | self._once
        self._once = {}
        self.last = record
        for writer in self._writers:
            writer.write(record)

    def _speed(self, steps: Sequence[Pending], seconds: float) -> Record:
        scale = self._hosts / seconds / len(self._devices)
        tokens = self._hosts * sum(pending.masked.tokens for pending in steps)
        masked = scale * sum(self._counter.train(pending.masked) for pending in steps)
        full = scale * sum(self._counter.train(pending.full) for pending in steps)
        if self.tokens is not None:
            self.tokens += tokens
        total: Record = {} if self.tokens is None else {"tokens_total": self.tokens}
        figures = total | {
            "tokens_since_last": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / len(steps),
            "device_flops_masked": masked,
            "device_flops_full": full,
        }
        best = peak(self._devices[0].device_kind)
        return figures if best is None else figures | {"mfu_masked": masked / best, "mfu_full": full / best}


def memory(devices: Sequence[jax.Device]) -> Record:
    """Peak bytes of the fullest local device where it says so, else the peak resident set of this process."""
    local = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    known = [stats["peak_bytes_in_use"] for stats in local if "peak_bytes_in_use" in stats]
    if known:
        return {"device_peak_bytes": max(known)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
