"""Reports: tidy rows to a results file, tables in markdown and plots as PNG."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Marks = "osD^vPX*"


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a JSONL file and waits until they are on the disk; all of them or, if the process dies, none."""
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    with open(path, "a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file. A last line without its end, cut by a kill, is taken off the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


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
    """`0.123 ±0.010`: the value and half its 95 % interval."""
    return f"{row['value']:.3f} ±{(row['high'] - row['low']) / 2:.3f}"


def lines_plot(
    path: Path,
    panels: dict[str, list[Row]],
    *,
    series: str,
    x: str,
    labels: dict[str, str],
    unit: tuple[float, float] | None = None,
):
    """One panel a title, one line a value of `series`, with 95 % intervals; `labels` are the axes'; `unit` fixes the range."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        names, places, cells = pivot(rows, series, x)
        for n, (name, line) in enumerate(zip(names, cells, strict=True)):
            found = [(place, cell) for place, cell in zip(places, line, strict=True) if cell]
            values = np.asarray([cell["value"] for _, cell in found])
            spread = np.abs(np.asarray([[cell["low"], cell["high"]] for _, cell in found]) - values[:, None]).T
            axis.errorbar(
                [p for p, _ in found], values, spread, marker=Marks[n % len(Marks)], capsize=2, label=str(name), lw=1.5, ms=5
            )
        axis.set(title=title, xlabel=labels["x"], ylabel=labels["y"], xscale="log", xticks=places, ylim=unit)
        axis.set_xticks(places, map(str, places))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def heatmap(path: Path, rows: Sequence[Row], *, title: str) -> None:
    """Accuracy over length (columns) and depth (rows, the start of the text on top), colours from 0 to 1."""
    plt = _pyplot()
    depths, lengths, cells = pivot(sorted(rows, key=lambda row: (row["depth"], row["length"])), "depth", "length")
    values = np.asarray([[np.nan if cell is None else cell["value"] for cell in line] for line in cells])
    figure, axis = plt.subplots(figsize=(1.6 + 0.9 * len(lengths), 1.4 + 0.5 * len(depths)), layout="constrained")
    image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white", fontsize=8)
    axis.set_xticks(range(len(lengths)), map(str, lengths))
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(title=title, xlabel="length (tokens)", ylabel="depth")
    figure.colorbar(image, label="exact match")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def curve(path: Path | str, metrics: Path | str) -> None:
    """The training loss of a `metrics.jsonl` over steps."""
    plt = _pyplot()
    rows = [row for row in read_rows(Path(metrics)) if "loss" in row]
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=1.5)
    axis.set(xlabel="step", ylabel="loss (nats, weighted)", yscale="log")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
