"""A memory of four matrices, few keys, a large step: where test-time training diverges.

    python -m experiments.train --config=config:stress.neural_memory.titans --run_dir=runs/stress
    python -m configs.stress.titans_pytorch 0.1

One layer of width 64 reads rows of 4,096 bytes in which two letters are bound to digits again and again, so that keys
of a chunk repeat 16 times. The second command trains titans-pytorch's memory so, of the same shape, with inner steps up
to 0.1.

Measured: 300 steps with inner steps up to 1.0, loss 5.41 at 10, 3.66 at 30, 3.21 at 300, finite throughout. titans-pytorch:
loss 5.76, then NaN by step 6 with inner steps up to 0.1; with 1.0 at the first step.
"""

from lcx.channels.glu import GLU
from lcx.data.bindings import Bindings
from lcx.data.pipeline import Pipeline, Weighted
from lcx.mixers.neural_memory import NeuralMemory
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant

TASK = Bindings(keys=2, loss="all")
LENGTH, WIDTH = 4096, 64


def titans(step: float = 1.0, steps: int = 300) -> Experiment:
    """step: the largest of the inner steps."""
    memory = NeuralMemory(heads=2, head_dim=32, depth=4, expand=2, chunk=64, step=step, taps=0)
    return Experiment(
        model=Decoder(vocab=264, width=WIDTH, pattern=(Layer(mixer=memory, channel=GLU(hidden=2 * WIDTH)),), periods=1),
        data=Pipeline(mixture=(Weighted(rows=TASK),), length=LENGTH, batch_size=1),
        optimizer=AdamW(learning_rate=Constant(peak=4e-3)),
        steps=steps,
        checkpoint=Checkpointing(every=100),
        log_every=10,
    )
