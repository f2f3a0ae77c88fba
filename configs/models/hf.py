"""A checkpoint folder of `transformers` as a config, so that its fields can be set where the folder itself is read.

F=models/llama-3-8b
python -m experiments.generate --run_dir=$F --config="config:models.hf.folder('$F')" --config=set:model.compute=float32
python -m experiments.serve --run_dir=$F --config="config:models.hf.folder('$F')" --config=set:mesh.tensor=8
"""

from pathlib import Path

from lcx.training.experiment import Experiment
from lcx.training.pretrained import pretrained


def folder(path: str) -> Experiment:
    """The experiment that would train it further (`lcx.training.pretrained`)."""
    return pretrained(Path(path))
