"""Runs an ablation in a run folder, or goes on where the folder stands; finished rows are skipped.

    python -m experiments.ablate --config=config:ablations.rope_extension.quickstart

Leaves results.jsonl (one tidy row a measurement), table.md and plots in the folder, and prints the table.
Exit status: 0 complete, 2 refused, 143 stopped by SIGTERM, in training after saving a checkpoint; finished rows stay.
"""

import signal
import sys

import jax

from experiments.program import Arguments, launch
from lcx.config_text import render
from lcx.evaluation.ablation import Ablation, Stopped, run
from lcx.evaluation.variant_figures import variant_figures
from lcx.plan import compared, listed, model_figures
from lcx.spec import SpecError
from lcx.support import validate
from lcx.training.experiment import Experiment
from lcx.training.run_folder import check_config


def main(arguments: Arguments) -> int:
    ablation = arguments.spec(Ablation)
    for arm in ablation.arms:
        for variant in (None, *ablation.variants):
            name = arm.name if variant is None else f"{arm.name}, {variant.name}"
            try:
                validate(ablation.experiment(arm, variant))
            except SpecError as error:
                raise SpecError(f"{name}: {error}") from None
    if arguments.dry_run:
        check_config(arguments.run_dir, ablation)
        print(render(ablation), figures(ablation), sep="\n\n")
        return 0
    for experiment in training_runs(ablation).values():
        validate(experiment, jax.device_count())
    run_dir = arguments.run_dir
    try:
        run(ablation, run_dir)
    except Stopped as stopped:
        print(f"ablate: {stopped}", file=sys.stderr)
        return 128 + signal.SIGTERM
    print((run_dir / "table.md").read_text())
    print(f"table, plots and rows: {run_dir}")
    return 0


def figures(ablation: Ablation) -> str:
    """What the ablation costs: its training runs, and what the models that it takes as they are cost to use; and what positions
    come to in its variants."""
    lengths = sorted({length for variant in ablation.variants for length in variant.lengths})
    named = {arm.name: ablation.experiment(arm) for arm in ablation.arms if arm.model is not None}
    blocks = [
        f"{name}\n{listed(model_figures(one.model, lengths, one.data.length, one.data.spread))}" for name, one in named.items()
    ]
    blocks += [compared(training_runs(ablation)), in_use(ablation, lengths), variant_figures(ablation)]
    return "\n\n".join(block for block in blocks if block)


def in_use(ablation: Ablation, lengths: list[int]) -> str:
    """What a row holds in use, and what a token of it costs, of each trained arm at the shortest and the longest length."""
    lines = []
    for arm in ablation.arms:
        if arm.model is None:
            ends = sorted({lengths[0], lengths[-1]})
            found = model_figures(ablation.experiment(arm).model, ends)
            cells = [
                f"{found[f'state bytes a row of {n}']:,} bytes and "
                f"{found[f'forward FLOPs a row of {n}, visible pairs only'] // n:,} FLOPs a token of {n:,}"
                for n in ends
            ]
            lines.append(f"{arm.name}: {'; '.join(cells)}")
    return "\n".join(["state of a row, forward pass:", *lines]) if lines else ""


def training_runs(ablation: Ablation) -> dict[str, Experiment]:
    """What is trained, by name: every arm without a model, and every variant of an arm that is fine-tuned."""
    found = {}
    for arm in ablation.arms:
        if arm.model is None:
            found[arm.name] = ablation.experiment(arm)
        found |= {f"{arm.name}, {v.name}": ablation.experiment(arm, v) for v in ablation.variants if v.finetune}
    return found


if __name__ == "__main__":
    launch(main)
