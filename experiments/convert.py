"""Writes a trained model as a folder: of the package's own form, or a checkpoint folder that `transformers` reads.

    python -m experiments.convert --run_dir=runs/reader --to=lcx/assets/reader                 # config, weights, curve
    python -m experiments.convert --run_dir=runs/tuned --to=out --format=hf --dtype=bfloat16   # config.json, safetensors
    python -m experiments.convert --run_dir=models/llama-3-8b --to=out --format=hf             # a checkpoint folder again
    python -m experiments.convert --run_dir=runs/lora --to=adapter --format=peft               # what LoRA adds, for its base

--run_dir is a run, a shipped model or a checkpoint folder; --to a new folder; --format=hf has LoRA merged, and may have
another rope, as long as the parameters stay: --config=set:model.rope.factor=32.0 --window=524288 edits what config.json says.
Exit status: 0 written, 2 refused.
"""

from pathlib import Path

from absl import flags

from experiments.program import Arguments, launch
from lcx.data.tokenizers import HFTokenizer
from lcx.evaluation.report import curve
from lcx.interop import hf, peft
from lcx.interop.families import family_for
from lcx.interop.folder import is_folder
from lcx.models.decoder import merged
from lcx.spec import SpecError, edit
from lcx.training.checkpoint import latest, load_model
from lcx.training.experiment import Experiment
from lcx.training.run_folder import read_trained
from lcx.training.shipped import export, run_folder


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("to", None, "folder to write", flag_values=values)
    flags.DEFINE_enum(
        "format", "lcx", ["lcx", "hf", "peft"], "of the package, for transformers, or for peft", flag_values=values
    )
    dtypes, where = sorted(hf.NUMBERS), "of --format=hf; default:"
    flags.DEFINE_enum("dtype", None, dtypes, f"of the tensors {where} the model's compute", flag_values=values)
    flags.DEFINE_integer("window", None, f"max_position_embeddings {where} as trained", lower_bound=1, flag_values=values)


def main(arguments: Arguments) -> None:
    asked = arguments.flags
    experiment, target = arguments.spec(Experiment, read=read_trained), asked.to
    if target is None:
        raise SpecError("--to is missing: expected the folder to write")
    if Path(target).exists():
        raise SpecError(f"--to={target}: exists already: expected a new folder")
    if asked.format != "hf" and (asked.dtype, asked.window) != (None, None):
        raise SpecError("--dtype and --window: expected --format=hf beside them")
    folder, window = run_folder(arguments.run_dir), asked.window or experiment.data.length
    if asked.format == "lcx" and is_folder(folder):
        raise SpecError(f"{folder}: a checkpoint folder, which is read where it stands: expected --format=hf")
    if asked.format == "hf":
        rope = experiment.model.rope
        if asked.window is None and rope != read_trained(folder).model.rope:
            raise SpecError(f"--window is missing: expected the tokens that the edited rope is for, {rope}")
        said = family_for(edit(experiment.model, "lora", None), window)[1]["max_position_embeddings"]
        if asked.window not in (None, said):
            raise SpecError(f"--window={window}: expected {said}, which config.json has to say for {rope}")
    base = None
    if asked.format == "peft":
        base = experiment.init_from and Path(experiment.init_from)
        if base is None or not is_folder(base):
            raise SpecError(
                f"Experiment.init_from = {experiment.init_from!r}: expected a checkpoint folder, whose adapter it is"
            )
    model = load_model(folder, experiment.model)
    if arguments.dry_run:
        print(f"would write {folder} at step {latest(folder)} to {target}")
        return
    try:
        if asked.format == "lcx":
            Path(target).mkdir(parents=True)
            size = export(model, latest(folder), folder, target)
            curve(f"{target}/curve.png", f"{target}/metrics.jsonl")
        elif asked.format == "peft":
            size = peft.write(model, base, Path(target))
        else:
            tokenizer = experiment.data.tokenizer
            theirs = isinstance(tokenizer, HFTokenizer)
            options = {"like": Path(tokenizer.path).parent, "ends": tokenizer.stops} if theirs else {}
            options["dtype"] = asked.dtype or experiment.model.compute
            whole = merged(model)
            size = hf.write(whole, whole.spec, window, Path(target), **options)
    except OSError as error:
        raise SpecError(f"--to={target}: cannot be made: {error.strerror}") from None
    print(f"{target}: {size:,} bytes of weights")


if __name__ == "__main__":
    launch(main)
