"""Writes a trained run as a folder to ship: config, weights in one file, log and training curve.

python -m experiments.convert --run_dir=runs/reader --to=lcx/assets/reader

--to is a new folder; --run_dir may name a shipped model. Exit status: 0 written, 2 refused.
"""

from pathlib import Path

from absl import flags

from experiments.program import Arguments, launch
from lcx.evaluation.report import curve
from lcx.spec import SpecError
from lcx.training.checkpoint import latest, load_model
from lcx.training.experiment import Experiment
from lcx.training.run_folder import read_trained
from lcx.training.shipped import export, run_folder


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("to", None, "folder to write", flag_values=values)


def main(arguments: Arguments) -> None:
    experiment, target = arguments.spec(Experiment, read=read_trained), arguments.flags.to
    if target is None:
        raise SpecError("--to is missing: expected the folder to write")
    if Path(target).exists():
        raise SpecError(f"--to={target}: exists already: expected a new folder")
    folder = run_folder(arguments.run_dir)
    model = load_model(folder, experiment.model)
    if arguments.dry_run:
        print(f"would write {folder} at step {latest(folder)} to {target}")
        return
    try:
        Path(target).mkdir(parents=True)
    except OSError as error:
        raise SpecError(f"--to={target}: cannot be made: {error.strerror}") from None
    size = export(model, latest(folder), folder, target)
    curve(f"{target}/curve.png", f"{target}/metrics.jsonl")
    print(f"{target}: {size:,} bytes of weights")


if __name__ == "__main__":
    launch(main)
