"""Trains an experiment in a run folder, or goes on where the folder stands.

    python -m experiments.train --config=config:recipes.quick_text.quick --run_dir=runs/quick
    python -m experiments.train --run_dir=runs/quick        # goes on with the run from its folder alone
    python -m experiments.train --multihost --config=...    # the same command on every host of a slice or cluster

Prints one JSON object at the end. Exit status: 0 complete, 1 diverged, 2 refused, 143 stopped by SIGTERM after saving a
checkpoint.
"""

import json

import jax
from absl import flags

from experiments.program import Arguments, launch
from lcx.parallel.hosts import join
from lcx.plan import report
from lcx.support import validate
from lcx.training.experiment import Experiment
from lcx.training.loop import train
from lcx.training.run_folder import check_config


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("multihost", False, "join the other hosts, each of which runs this command", flag_values=values)


def main(arguments: Arguments) -> int:
    experiment = arguments.spec(Experiment)
    validate(experiment)
    if arguments.dry_run:
        check_config(arguments.run_dir, experiment)
        print(report(experiment))
        return 0
    if arguments.flags.multihost:
        join()
    validate(experiment, jax.device_count())
    result = train(experiment, arguments.run_dir)
    print(json.dumps({"run_dir": str(arguments.run_dir), "status": result.status, **result.metrics}))
    return result.exit_status


if __name__ == "__main__":
    launch(main)
