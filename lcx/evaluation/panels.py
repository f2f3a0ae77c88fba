"""Panels of an ablation: which numbers its tables and plots show."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcx.evaluation.report import Lines, caption, heatmap, lines_plot, select, table, with_interval
from lcx.evaluation.tasks.task import Row, Task
from lcx.spec import Spec

_CELL = ("arm", "stage", "method", "length")  # one number each
_MEASURED = ("value", "low", "high", "count", "examples", "seconds", "parameters", "variant", "scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel(Spec):
    """One table and one plot an arm: a metric of a task; `where` fixes what else tells its rows apart (bucket, depth)."""

    title: str
    task: str
    metric: str
    where: tuple[tuple[str, Any], ...] = ()

    def check_against(self, tasks: Sequence[Task]) -> None:
        """Raises SpecError unless one of the tasks has the metric."""
        metrics = {task.name: task.metrics for task in tasks}
        self.check(self.task in metrics, "task", f"one of {', '.join(metrics)}")
        self.check(self.metric in metrics[self.task], "metric", f"one of {', '.join(metrics[self.task])}")

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Its rows. Raises SpecError if there are none, or several for one cell of its tables."""
        of_metric = select(rows, task=self.task, metric=self.metric)
        found = select(of_metric, **dict(self.where))
        if not found:
            names = list(dict(self.where))
            held = sorted({str({name: row.get(name) for name in names}) for row in of_metric})
            self.fail("where", self.where, f"values of some row; there are {', '.join(held)}")
        cells: dict[tuple, Row] = {}
        for row in found:
            other = cells.setdefault(tuple(row[name] for name in _CELL), row)
            if other is not row:
                differing = [name for name in row if name not in _MEASURED and row[name] != other.get(name)]
                self.fail("where", self.where, f"a value for {', '.join(differing)} too: several rows share a cell")
        return found


def report(run_dir: Path, rows: Sequence[Row], *, arms: Sequence[str], tasks: Sequence[Task], panels: Sequence[Panel]) -> None:
    """Writes table.md, and for every arm a plot over lengths and, where a task has depths, heatmaps of exact matches.

    Raises SpecError for a panel that no row, or more than one row a cell, belongs to.
    """
    shown = {panel.title: panel.rows(rows) for panel in panels}
    metrics = {task.name: task.metrics for task in tasks}
    text = []
    for arm in arms:
        lines = []
        for panel in panels:
            found = select(shown[panel.title], arm=arm)
            text.append(f"### {arm}: {panel.title}\n")
            for stage in dict.fromkeys(row["stage"] for row in found):
                of_stage = select(found, stage=stage)
                text += [f"{stage}, {caption(of_stage)}:\n", table(of_stage, "method", "length", with_interval), ""]
            lines.append(Lines(panel.title, metrics[panel.task][panel.metric], found))
        lines_plot(run_dir / f"{arm}.png", lines, series="method", style="stage")
        for task in tasks:
            placed = [row for row in select(rows, arm=arm, task=task.name, metric="exact") if "depth" in row]
            for variant in dict.fromkeys(row["variant"] for row in placed):
                path = run_dir / f"{arm}-{task.name}-{variant.replace(' ', '-')}.png"
                heatmap(path, select(placed, variant=variant), title=f"{task.name}: {arm}, {variant}")
    (run_dir / "table.md").write_text("\n".join(text))
