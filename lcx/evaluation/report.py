"""Reports: tidy rows to a results file, tables in markdown and plots as PNG."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcx.evaluation.tasks.task import Metric, Row

PART = "part"  # of a line in the file: [its place in its group from 1, the group's size]
MARKS = "osD^vPX*"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")  # told apart without colour vision


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds a group of rows to a JSONL file and waits until it is on the disk. Read back, it is there as a whole or not at all.

    A last group without its end, cut by a kill, is taken off the file first. Raises ValueError, and writes nothing, if a row
    holds a number that JSON has no word for.
    """
    lines = [json.dumps(row | {PART: [n, len(rows)]}, sort_keys=True, allow_nan=False) for n, row in enumerate(rows, start=1)]
    whole = _scan(path)[1]
    with open(path, "ab") as file:
        file.truncate(whole)
        file.write("".join(line + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file; a last group without its end does not count. Reads only.

    Raises ValueError if a row is missing between others. Lines without a part are groups of one.
    """
    return _scan(path)[0]


def _scan(path: Path) -> tuple[list[Row], int]:
    """(rows of the complete groups, bytes up to their end)."""
    rows: list[Row] = []
    group: list[Row] = []
    at = whole = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        at += len(line)
        if not line.endswith(b"\n"):
            break
        row = json.loads(line)
        place, size = row.pop(PART, (1, 1))
        if place != len(group) + 1:
            raise ValueError(f"{path}: part {place} of {size} follows {len(group)} others: rows are missing")
        group.append(row)
        if place == size:
            rows, group, whole = rows + group, [], at
    return rows, whole


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows whose named fields have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def pivot(rows: Sequence[Row], index: str, columns: str) -> tuple[list[Any], list[Any], list[list[Row | None]]]:
    """(index values, column values, cells) in order of first appearance. Raises ValueError where two rows share a cell."""
    names = list(dict.fromkeys(row[index] for row in rows))
    heads = list(dict.fromkeys(row[columns] for row in rows))
    cells: list[list[Row | None]] = [[None] * len(heads) for _ in names]
    for row in rows:
        i, j = names.index(row[index]), heads.index(row[columns])
        if cells[i][j] is not None:
            raise ValueError(f"two rows for {index} = {row[index]}, {columns} = {row[columns]}")
        cells[i][j] = row
    return names, heads, cells


def table(rows: Sequence[Row], index: str, columns: str, show: Callable[[Row], str]) -> str:
    """A markdown table of the pivot; an absent cell is a dash."""
    names, heads, cells = pivot(rows, index, columns)
    lines = [[index, *map(str, heads)], ["---"] + ["---:"] * len(heads)]
    lines += [[str(name), *(show(cell) if cell else "–" for cell in line)] for name, line in zip(names, cells, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_interval(row: Row) -> str:
    """`0.123 [0.101, 0.140]`: the value and its 95 % interval."""
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def caption(rows: Sequence[Row]) -> str:
    """What the cells of a table stand on."""
    counts = sorted({row["examples"] for row in rows})
    examples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"by length in tokens; mean and bootstrap 95 % interval over {examples} examples"


class Lines(NamedTuple):
    """One panel of a plot."""

    title: str
    metric: Metric
    rows: Sequence[Row]


def lines_plot(path: Path, panels: Sequence[Lines], *, series: str, style: str) -> None:
    """Values over length with 95 % intervals: a colour and mark for each value of `series`; of `style`, the first is drawn in
    full lines, others dashed with hollow marks. Each is moved a little along the axis, so that none hides another.
    """
    names, styles = ([*dict.fromkeys(row[field] for panel in panels for row in panel.rows)] for field in (series, style))
    figure = _figure(max(4.4 * len(panels), 1.8 * min(4, len(names))), 4.0)  # the legend has up to four columns
    axes = figure.subplots(1, len(panels), squeeze=False)
    drawn = {}
    for axis, panel in zip(axes[0], panels, strict=True):
        lengths = sorted({row["length"] for row in panel.rows})
        present = {(row[series], row[style]) for row in panel.rows}
        kinds = [(name, kind) for name in names for kind in styles if (name, kind) in present]
        for (name, kind), shift in zip(kinds, _shifts(lengths, len(kinds)), strict=True):
            found = sorted(select(panel.rows, **{series: name, style: kind}), key=lambda row: row["length"])
            looks = _looks(names.index(name), hollow=kind != styles[0])
            drawn[(kind, name)] = _draw(axis, found, shift, **looks)
        axis.set(title=panel.title, xlabel="length (tokens)", ylabel=panel.metric.unit, xscale="log")
        axis.set_xticks(lengths, map(str, lengths))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if panel.metric.range is not None:
            low, high = panel.metric.range
            axis.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    ordered = sorted(drawn, key=lambda key: styles.index(key[0]))
    labels = [f"{name}, {kind}" if len(styles) > 1 else str(name) for kind, name in ordered]
    figure.legend([drawn[key] for key in ordered], labels, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
    figure.savefig(path, dpi=120)


def _looks(n: int, *, hollow: bool) -> dict[str, str]:
    looks = {"color": COLOURS[n % len(COLOURS)], "marker": MARKS[n % len(MARKS)]}
    return looks | ({"linestyle": "--", "markerfacecolor": "white"} if hollow else {})


def _shifts(lengths: Sequence[int], count: int) -> np.ndarray:
    """Factors of the length, one a line, centred on 1: together at most a third of the narrowest gap between lengths."""
    gap = np.diff(np.log(lengths)).min(initial=np.log(2))
    return np.exp(min(0.04, gap / 3 / count) * (np.arange(count) - (count - 1) / 2))


def _draw(axis, rows: Sequence[Row], shift: float, **looks: str):
    values = np.asarray([row["value"] for row in rows])
    spread = np.abs(np.asarray([[row["low"], row["high"]] for row in rows]) - values[:, None]).T
    return axis.errorbar([shift * row["length"] for row in rows], values, spread, capsize=2, lw=1.5, ms=5, **looks)


def heatmap(path: Path, rows: Sequence[Row], *, title: str) -> None:
    """Accuracy over length (columns) and depth (rows, the start of the text on top), colours from 0 to 1; absent is white."""
    depths, lengths, cells = pivot(rows, "depth", "length")
    values = np.asarray([[np.nan if cell is None else cell["value"] for cell in line] for line in cells])
    values = values[np.argsort(depths)][:, np.argsort(lengths)]
    figure = _figure(1.6 + 0.9 * len(lengths), 1.4 + 0.5 * len(depths))
    axis = figure.subplots()
    image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "black" if value > 0.6 else "white"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(lengths)), map(str, sorted(lengths)))
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in sorted(depths)])
    axis.set(title=title, xlabel="length (tokens)", ylabel="depth")
    figure.colorbar(image, label="exact match")
    figure.savefig(path, dpi=120)


def curve(path: Path | str, metrics: Path | str) -> None:
    """The training loss of a `metrics.jsonl` over steps."""
    rows = [row for row in read_rows(Path(metrics)) if "loss" in row]
    figure = _figure(5.0, 3.4)
    axis = figure.subplots()
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=1.5)
    axis.set(xlabel="step", ylabel="loss (nats, weighted)", yscale="log")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
