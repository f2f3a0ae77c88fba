"""A checkpoint folder of `transformers` as a config, for a run of its own. Where it is --run_dir itself, `set:` is enough.

F=models/llama-3-8b
python -m experiments.train --config="config:models.hf.folder('$F')" --config=set:data.length=4096 --run_dir=runs/further
python -m experiments.generate --run_dir=$F --config=set:model.compute=float32
"""

from pathlib import Path

from lcx.training.experiment import Experiment
from lcx.training.pretrained import pretrained


def folder(path: str) -> Experiment:
    """The experiment that would train it further (`lcx.training.pretrained`)."""
    return pretrained(Path(path))
