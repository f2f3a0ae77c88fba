"""A tiny training run on recall records, for tests in this process and in ones that are killed."""

import contextlib
import os
import sys
from pathlib import Path

from lcx.channels.glu import GLU
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles, Records
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.loop import train
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant


def experiment(*, steps: int, every: int | None = None, **options) -> Experiment:
    layer = Layer(mixer=Attention(heads=2, kv_heads=1, head_dim=4), channel=GLU(hidden=16))
    kinds = (Weighted(rows=Records(), weight=2.0), Weighted(rows=Needles(key_letters=2, value_digits=2)))
    defaults = {
        "model": Decoder(vocab=264, width=8, pattern=(layer,), periods=2),
        "data": Pipeline(mixture=kinds, length=48, batch_size=4),
        "optimizer": AdamW(learning_rate=Constant(peak=1e-2)),
        "log_every": 1,
        "checkpoint": Checkpointing(every=every),
    }
    return Experiment(steps=steps, **{**defaults, **options})


def run_in_child(run_dir: Path, steps: int, every: int) -> None:
    """The body of a child process: trains, and exits with the run's status."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        result = train(experiment(steps=steps, every=every), run_dir)
    sys.exit(result.exit_status)
