"""One figure of rows that were measured arm by arm: values over length, a line an arm, a panel a task and metric.

python -m lcx.evaluation.figure docs/results/memory_bytes.jsonl docs/results/memory_bytes.png
"""

import json
import sys
from pathlib import Path

from lcx.evaluation.report import Lines, lines_plot, select
from lcx.evaluation.tasks.task import ANSWERS, NLL, TOKENS

METRICS = {"nll": NLL, "exact": ANSWERS, "token_accuracy": TOKENS}


def figure(rows: Path, target: Path) -> None:
    """Draws every task and metric of the rows that has a scale of its own."""
    found = [row for row in map(json.loads, rows.read_text().splitlines()) if row["metric"] in METRICS]
    kinds = dict.fromkeys((row["task"], row["metric"]) for row in found)
    panels = [Lines(f"{task}, {metric}", METRICS[metric], select(found, task=task, metric=metric)) for task, metric in kinds]
    lines_plot(target, panels, series="arm", style="method")


if __name__ == "__main__":
    figure(*map(Path, sys.argv[1:]))
