"""Measures of a model what a cache has to know beforehand: tables of KVQuant, directions of Q-Filters, gates of heads.

python -m experiments.calibrate --run_dir=reader --to=reader.npz
python -m experiments.calibrate --run_dir=reader --to=filters.npz --method=QFilters
python -m experiments.calibrate --run_dir=models/llama-3.1-8b --to=llama.npz --text=books --length=2048 --windows=16

Without --text it reads the standard library's source code. What it wrote is read by
--config=set:model.pattern[0].mixer.cache=..., with one of

    KVQuant         KVCache(keys='raw',codec=KVQuant(calibration='reader.npz'))
    QFilters        KVCache(policy=Evict(score=QFilters(directions='filters.npz'),keep=0.2))
    DuoAttention    KVCache(policy=DuoAttention(gates='gates.npz'))

In a model's folder as kvquant.npz, qfilters.npz or duo_attention.npz it is found by the folder's name, as a shipped model's:
--to=models/llama-3.1-8b/kvquant.npz. A model with several kinds of layers has a cache of each: pattern[0], pattern[1], ...
A file says of which parameters it is, and other ones refuse it. --outliers and --sinks are of KVQuant.
Exit status: 0 written, 2 refused.
"""

import contextlib
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.generate import define_mesh, on_mesh
from experiments.program import Arguments, launch
from lcx.cache.cache import Cache
from lcx.cache.dense import DenseCache
from lcx.cache.known import MODEL
from lcx.data.sources import StandardLibrary, TextFolder
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.inference.calibration import tables
from lcx.inference.head_statistics import statistics
from lcx.spec import SpecError, below, edits
from lcx.support import validate
from lcx.training.checkpoint import load_model
from lcx.training.experiment import Experiment
from lcx.training.run_folder import read_trained
from lcx.training.shipped import run_folder

STATISTICS = {"QFilters": "directions", "DuoAttention": "gates"}


def define(values: flags.FlagValues) -> None:
    define_mesh(values)
    flags.DEFINE_string("to", None, "file to write", flag_values=values)
    flags.DEFINE_enum("method", "KVQuant", ["KVQuant", *STATISTICS], "what it is for", flag_values=values)
    flags.DEFINE_string("text", None, "folder of texts; default: the standard library's source code", flag_values=values)
    flags.DEFINE_integer("windows", 16, "texts that are read", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("length", None, "tokens of each; default: the model's window", lower_bound=8, flag_values=values)
    flags.DEFINE_list("outliers", ["0", "0.01"], "shares of numbers held apart", flag_values=values)
    flags.DEFINE_integer("sinks", 1, "first tokens of a text that are left out", lower_bound=0, flag_values=values)


def main(arguments: Arguments) -> None:
    asked = arguments.flags
    experiment = _without_caches(arguments.spec(Experiment, read=read_trained))
    validate(experiment)
    if asked.to is None or not asked.to.endswith(".npz"):
        raise SpecError(f"--to={asked.to}: expected the file to write, such as tables.npz")
    if Path(asked.to).exists():
        raise SpecError(f"--to={asked.to}: exists already: expected a new file")
    if not Path(asked.to).absolute().parent.is_dir():
        raise SpecError(f"--to={asked.to}: expected a file in a folder that exists")
    for name in ("outliers", "sinks"):
        if asked.method != "KVQuant" and asked[name].present:
            raise SpecError(f"--{name}: expected none beside --method={asked.method}, which has none")
    shares = [_share(text) for text in asked.outliers or [""]]
    source = TextFolder(path=asked.text) if asked.text else StandardLibrary(split="train")
    length = asked.length or experiment.data.length
    if length > experiment.data.length:
        most = f"at most data.length = {experiment.data.length}, the model's window"
        raise SpecError(f"--length={length}: expected {most}; with a rope for more, --config=set:data.length={length}")
    if asked.sinks >= length:
        raise SpecError(f"--sinks={asked.sinks}: expected fewer than the {length} tokens of a text")
    reads = Perplexity(source=source, windows=asked.windows, buckets=1, fewer="take")
    rows = reads.inputs(experiment.data.tokenizer, length)
    if len(rows) < asked.windows:
        raise SpecError(f"--windows={asked.windows}: expected at most {len(rows)}, the texts of {length} tokens that there are")
    if asked.context > 1:
        raise SpecError(f"--context={asked.context}: expected 1, as texts are read whole; share out rows or heads")
    model_spec, mesh = on_mesh(asked, experiment.model, length)
    if arguments.dry_run:
        print(f"would read {len(rows)} texts of {length} tokens")
        return
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        model = load_model(run_folder(arguments.run_dir), model_spec, mesh=mesh)
        if asked.method == "KVQuant":
            made = tables(model, rows, outliers=shares, sinks=asked.sinks)
        else:
            found = statistics(model, rows)
            made = {name: found[name] for name in (STATISTICS[asked.method], MODEL)}
    np.savez_compressed(asked.to, **made)
    print(f"{asked.to}: {Path(asked.to).stat().st_size:,} bytes, {experiment.model.depth} layers")


def _without_caches(experiment: Experiment) -> Experiment:
    """With dense caches, as those of the config may be what is to be measured for."""
    caches = [path for path, part in below(experiment, "") if isinstance(part, Cache)]
    return edits(experiment, [(path, DenseCache()) for path in caches])


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 0.5:
        raise SpecError(f"--outliers={text}: expected shares of at least 0 and below 0.5, such as 0,0.01")
    return share


if __name__ == "__main__":
    launch(main)
