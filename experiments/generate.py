"""Continues a prompt with a trained model, streaming the text.

    python -m experiments.generate --run_dir=runs/quick --prompt='def main(' --max_new=200 --temperature=0.8
    echo 'import os' | python -m experiments.generate --run_dir=runs/quick
    python -m experiments.generate --run_dir=reader --prompt='def main('     # a model that comes with the package

Another rope or cache than the trained one is an edit, the parameters stay:
    --config=config_file:runs/quick/config.json --config='set:model.rope=YaRN(factor=4.0, original_length=256)'
"""

import sys

from absl import flags

from experiments.program import Arguments, launch
from lcx.config_text import render
from lcx.inference.sampling import Sampling
from lcx.inference.stream import stream, text_of
from lcx.plan import listed, model_figures
from lcx.spec import SpecError
from lcx.support import validate
from lcx.training.checkpoint import load_model
from lcx.training.experiment import Experiment
from lcx.training.run_folder import read_trained
from lcx.training.shipped import run_folder


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("prompt", None, "text to continue; default: standard input", flag_values=values)
    flags.DEFINE_integer("max_new", 256, "most tokens to generate", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", None, "sample among the k likeliest", flag_values=values)
    flags.DEFINE_float("top_p", None, "sample among the fewest whose mass reaches p", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the samples", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint of this step; default: the newest", flag_values=values)


def main(arguments: Arguments) -> None:
    asked = arguments.flags
    experiment = arguments.spec(Experiment, read=read_trained)
    validate(experiment)
    sampling = Sampling(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p)
    if arguments.dry_run:
        print(f"{render(experiment.model, 'model')}\n{render(sampling, 'sampling')}\n")
        print(listed(model_figures(experiment.model, (experiment.data.length,))))
        return
    tokenizer = experiment.data.tokenizer
    prompt = sys.stdin.read() if asked.prompt is None else asked.prompt
    if not prompt:
        raise SpecError("--prompt is empty: expected some text to continue")
    model = load_model(run_folder(arguments.run_dir), experiment.model, step=asked.step)
    options = {"max_new": asked.max_new, "sampling": sampling, "seed": asked.seed, "stop": (tokenizer.eos,)}
    pieces = text_of(stream(model, tokenizer.encode(prompt).tolist(), **options), tokenizer)
    first = next(pieces, "")  # before the prompt is shown, so that what is logged on the way stands above the text
    print(prompt, end=first, flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    launch(main)
