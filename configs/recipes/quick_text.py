from fiddle.experimental.auto_config import auto_config

from configs.models import byte
from lcx.data.pipeline import Pipeline
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Cosine


@auto_config
def quick(width: int = 128, length: int = 256) -> Experiment:
    return Experiment(
        model=byte.toy(width=width),
        data=Pipeline(length=length, batch_size=16),
        optimizer=AdamW(learning_rate=Cosine(peak=2e-3, warmup=20)),
        steps=200,
    )
