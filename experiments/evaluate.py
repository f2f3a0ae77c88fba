"""Measures the trained model of a run folder, or goes on where the results stand.

    python -m experiments.evaluate --config='config:recipes.quick_text.evaluate(model="runs/quick")' --run_dir=runs/quick-text
    ... --config='set:edits=(("model.rope", YaRN(factor=4.0, original_length=256)),)'    the same parameters, another rope

Leaves results.jsonl (one tidy row a number) and table.md in the folder, and prints the table.
"""

from experiments.program import Arguments, launch
from lcx.config_text import render
from lcx.evaluation.checks import check_inputs
from lcx.evaluation.evaluation import Evaluation, evaluate
from lcx.plan import listed, model_figures
from lcx.support import validate
from lcx.training.run_folder import check_config


def main(arguments: Arguments) -> None:
    evaluation = arguments.spec(Evaluation)
    experiment = evaluation.experiment()
    validate(experiment)
    if arguments.dry_run:
        check_config(arguments.run_dir, evaluation)
        tokenizer = experiment.data.tokenizer
        check_inputs((tokenizer, task, length) for task in evaluation.tasks for length in evaluation.lengths)
        print(render(evaluation, "config"), render(experiment.model, "model"), sep="\n\n")
        print("", listed(model_figures(experiment.model, evaluation.lengths, experiment.data.length)), sep="\n")
        return
    run_dir = arguments.run_dir
    evaluate(evaluation, run_dir)
    print((run_dir / "table.md").read_text())
    print(f"table and rows: {run_dir}")


if __name__ == "__main__":
    launch(main)
