"""Where metrics go: `metrics.jsonl`, TensorBoard event files and the terminal. Each takes the record of one log step.

All of them take part in a resume: what an earlier process wrote past the restored step is removed or superseded, so every
step stands once in the end.
"""

import abc
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lcx.spec import SpecError

Record = dict[str, float | int | str]


class Writer(abc.ABC):
    """Takes records, one a log step, and is closed at the end."""

    @abc.abstractmethod
    def write(self, record: Record) -> None: ...

    @abc.abstractmethod
    def close(self) -> None: ...


class JsonLines(Writer):
    """`metrics.jsonl`, one object a line, flushed at once. Lines after `step` (of a run that was cut off) are removed."""

    def __init__(self, path: Path, *, step: int):
        kept = [record for record in read_records(path) if record["step"] <= step] if path.exists() else []
        fresh = path.with_suffix(".jsonl.new")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(fresh, path)
        self._file = path.open("a")

    def write(self, record):
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


def read_records(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`. A last line without its end, which a killed process leaves, is not a record.

    Raises SpecError with file and line for one that is none.
    """
    *lines, _ = Path(path).read_bytes().split(b"\n")
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _record(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:  # of the JSON or of its encoding
        raise SpecError(f"{place}: not a record: {error}; delete the line") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise SpecError(f"{place}: not a record: expected an object with a step; delete the line")
    return record


class TensorBoard(Writer):
    """One event file a process; scalars `train/NAME`. Events of earlier processes after `step` are superseded."""

    def __init__(self, folder: Path, *, step: int):
        self._events = EventFileWriter(str(folder))
        self._events.add_event(Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def write(self, record):
        values = [
            Summary.Value(tag=f"train/{name}", simple_value=value)
            for name, value in record.items()
            if name != "step" and not isinstance(value, str)
        ]
        self._events.add_event(Event(step=int(record["step"]), wall_time=time.time(), summary=Summary(value=values)))

    def close(self):
        self._events.close()


class Bar(Writer):
    """A progress bar with the time left, for terminals. In a narrow one the last figures are cut off, never the time."""

    def __init__(self, *, step: int, steps: int):
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TimeRemainingColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), expand=True)
        self._task = self._progress.add_task("", total=steps, completed=step)
        self._progress.start()

    def write(self, record):
        self._progress.update(self._task, completed=record["step"], description=headline(record))

    def close(self):
        self._progress.stop()


class Lines(Writer):
    """One plain line a record, on standard error."""

    def __init__(self, *, steps: int):
        self._steps = steps

    def write(self, record):
        print(f"step {record['step']}/{self._steps} {headline(record)}", file=sys.stderr, flush=True)

    def close(self):
        pass


def terminal(*, step: int, steps: int) -> Writer:
    """A bar where a person is looking (standard error is a terminal), plain lines otherwise."""
    return Bar(step=step, steps=steps) if sys.stderr.isatty() else Lines(steps=steps)


def headline(record: Record) -> str:
    """The few figures that a person watches."""
    shown = {
        "loss": "loss {:.4f}",
        "gradient_norm": "gradient {:.3f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu_masked": "MFU {:.1%}",
        "mfu_full": "({:.1%} counted full)",
    }
    return " ".join(form.format(record[name]) for name, form in shown.items() if name in record)
