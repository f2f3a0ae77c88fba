"""Memories between segments that are trained in stages, on the shipped reader.

    python -m experiments.train --config=config:recipes.memory_stages.hmt_without_recall --run_dir=runs/hmt-1
    python -m experiments.train --config='config:recipes.memory_stages.hmt_with_recall(first="runs/hmt-1")' --run_dir=runs/hmt-2

    python -m experiments.train --config='config:recipes.memory_stages.rmt(segments=1)' --run_dir=runs/rmt-1
    python -m experiments.train --config='config:recipes.memory_stages.rmt(segments=2, after="runs/rmt-1")' --run_dir=runs/rmt-2

HMT (2024): first without recall and gradients through two segments, then with recall through more. RMT (2022): a curriculum of
1, 2, 4 ... segments a row, without which memories over many segments are not learned. All parameters are trained.
Run for a few steps each (HMT), not to a result yet.
"""

import dataclasses

from configs.models import reader
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles
from lcx.data.sources import StandardLibrary
from lcx.memory.hmt import HMT
from lcx.memory.rmt import RMT
from lcx.memory.segment_memory import SegmentMemory
from lcx.spec import edits
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Cosine

SEGMENT = 128
STAGE_ONE = HMT(segment=SEGMENT, sensory=16, bank=32, size=32, recall=False, bptt=2)


def hmt_without_recall(steps: int = 300) -> Experiment:
    """Stage 1: a segment reads what the one before left."""
    return _stage(STAGE_ONE, 4, steps, "reader")


def hmt_with_recall(first: str = "runs/hmt-1", steps: int = 300) -> Experiment:
    """Stage 2, from stage 1: a segment recalls what any before it left."""
    return _stage(dataclasses.replace(STAGE_ONE, recall=True, bptt=None), 8, steps, first)


def rmt(segments: int = 1, after: str = "reader", steps: int = 200) -> Experiment:
    """A stage of the curriculum, from the one before."""
    return _stage(RMT(segment=SEGMENT, slots=8), segments, steps, after)


def _stage(memory: SegmentMemory, segments: int, steps: int, start: str) -> Experiment:
    text = PackedText(source=StandardLibrary(split="train"), most=4)
    needles = Needles(needles=2, queries=2, answer_weight=10.0)
    return dataclasses.replace(
        reader.train(),
        steps=steps,
        model=edits(reader.train().model, [("memory", memory), ("documents", 4)]),
        data=Pipeline(mixture=(Weighted(rows=text), Weighted(rows=needles)), length=segments * SEGMENT, batch_size=8),
        optimizer=AdamW(learning_rate=Cosine(peak=1e-3, warmup=20)),
        init_from=start,
    )
