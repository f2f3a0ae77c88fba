"""Writes a trained run as a folder to ship: config, weights in one file, log and training curve.

python -m experiments.convert --run_dir=runs/reader --to=lcx/assets/reader
"""

from absl import flags

from experiments.program import Arguments, launch
from lcx.evaluation.report import curve
from lcx.spec import SpecError
from lcx.training.checkpoint import latest, load_model
from lcx.training.experiment import Experiment
from lcx.training.shipped import export


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("to", None, "folder to write", flag_values=values)


def main(arguments: Arguments) -> None:
    experiment, target = arguments.spec(Experiment), arguments.flags.to
    if target is None:
        raise SpecError("--to is missing: expected the folder to write")
    model = load_model(arguments.run_dir, experiment.model)
    if arguments.dry_run:
        print(f"would write {arguments.run_dir} at step {latest(arguments.run_dir)} to {target}")
        return
    size = export(model, latest(arguments.run_dir), arguments.run_dir, target)
    curve(f"{target}/curve.png", f"{target}/metrics.jsonl")
    print(f"{target}: {size:,} bytes of weights")


if __name__ == "__main__":
    launch(main)
