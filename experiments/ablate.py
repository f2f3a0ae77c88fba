"""Runs an ablation in a run folder, or goes on where the folder stands; finished rows are skipped.

    python -m experiments.ablate --config=config:ablations.rope_extension.quickstart

Leaves results.jsonl (one tidy row a measurement), table.md and plots in the folder, and prints the table.
Exit status: 0 complete, 2 refused.
"""

import jax

from experiments.program import Arguments, launch
from lcx.config_text import render
from lcx.evaluation.ablation import Ablation, run
from lcx.plan import report
from lcx.support import validate
from lcx.training.run_folder import open_run


def main(arguments: Arguments) -> int:
    ablation = arguments.spec(Ablation)
    experiments = [ablation.experiment(arm, variant) for arm in ablation.arms for variant in (None, *ablation.variants)]
    for experiment in experiments:
        validate(experiment)
    if arguments.dry_run:
        print(render(ablation), report(experiments[0]), sep="\n\n")
        return 0
    for experiment in experiments:
        validate(experiment, jax.device_count())
    run_dir = open_run(arguments.run_dir, ablation)
    run(ablation, run_dir)
    print((run_dir / "table.md").read_text())
    print(f"table, plots and rows: {run_dir}")
    return 0


if __name__ == "__main__":
    launch(main)
