"""A tiny training run on recall records, for tests in this process and in ones that are killed."""

import contextlib
import os
import sys
from pathlib import Path

import jax

from lcx.channels.glu import GLU
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles, Records
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
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


def run_as_one_of_two(process: int, port: int, run_dir: Path, steps: int) -> None:
    """The body of one of two processes of four devices each, which train together."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    mesh = MeshSpec(data=2, fsdp=2, context=2)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        result = train(experiment(steps=steps, mesh=mesh), run_dir)
    sys.exit(result.exit_status)
