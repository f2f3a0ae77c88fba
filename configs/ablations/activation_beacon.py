"""Activation Beacon on a small reader that stays as it is: what of far text a window still knows through beacons.

    python -m experiments.ablate --config='config:ablations.activation_beacon.beacons(only="interleaved")'
    python -m experiments.ablate --config='config:ablations.activation_beacon.plain(only="reader, window")'

The shipped `reader` (0.67 M parameters, trained at 512 bytes) is frozen; beacons alone are trained, on rows of 1,024 bytes in
windows of 128. Each is measured at several ratios, on held-out code and on a passkey, at 512 to 4,096 bytes, beside the reader
as it is, with a window of 256, and with all its parameters trained at 1,024.

Expected (paper, at 7B): beacons lose little against full attention at ratio 8, less at smaller ratios; step and interleaved
coverage no worse than segments; ratios drawn at random hold at ratios that a single one does not.

Measured, `interleaved` (docs/results/memory.md), code in nats a byte at 512 / 1,024 / 4,096: ratio 2 1.29 1.32 1.58, ratio 4
1.27 1.28 1.37, ratio 8 1.27 1.28 1.26, ratio 16 1.27 1.28 1.24; the passkey is not carried (exact 0.16 at 512, 0.03 beyond).
Not as expected: small ratios are no better, and worse where they need more positions than the reader knows. Appended 1.26 1.28
1.40 at ratio 2 by steps, 1.26 1.29 1.41 by segments, 1.26 1.29 1.44 full, 1.26 1.27 1.22 of each at ratio 16: coverage makes no
difference. Ratio 4 alone 1.27 1.29 1.54, and 1.93 at ratio 2 and 4,096: random ratios hold where one does not, as expected. The
reader in a window of 256 has 1.17 1.17 1.14 without beacons, with all parameters trained 1.13 1.10 1.08.
"""

import dataclasses

from configs.ablations.arms import chosen
from configs.models import reader
from lcx.attention.mask import Window
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles
from lcx.data.sources import StandardLibrary
from lcx.evaluation.ablation import Ablation, Arm, Variant
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.objectives.beacon_modeling import BeaconModeling
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Cosine

LENGTHS, TRAINED, WINDOW = (512, 1024, 2048, 4096), 1024, 128
RATIOS = (2, 4, 8, 16)
OWN = ("memory/*", "*/beacon_*")  # parameters

INTERLEAVED = ActivationBeacon(window=WINDOW, ratio=4, ratios=RATIOS)
APPENDED = dataclasses.replace(INTERLEAVED, layout="appended")


def base(steps: int = 500) -> Experiment:
    """The reader, trained further on longer rows: code, and needles in noise and in code."""
    return dataclasses.replace(
        reader.train(),
        data=Pipeline(
            mixture=(
                Weighted(rows=PackedText(source=StandardLibrary(split="train")), weight=2.0),
                Weighted(rows=Needles(needles=2, queries=2, answer_weight=10.0)),
                Weighted(rows=Needles(haystack=StandardLibrary(split="train"), answer_weight=10.0)),
            ),
            length=TRAINED,
            batch_size=4,
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=2e-3, warmup=30), decay=0.0),
        steps=steps,
        init_from="reader",
        checkpoint=Checkpointing(every=250),
    )


def beacons(steps: int = 500, only: str | None = None) -> Ablation:
    """Layouts and coverages with ratios drawn for each window, and one ratio alone; each at every ratio."""
    apart = dataclasses.replace(APPENDED, coverage="step", previous=False)
    arms = {
        "interleaved": INTERLEAVED,
        "appended, full": APPENDED,
        "appended, step": apart,
        "appended, segment": dataclasses.replace(apart, coverage="segment"),
    }
    made = {name: _beacons(memory, RATIOS) for name, memory in arms.items()}
    made["interleaved, ratio 4 alone"] = _beacons(INTERLEAVED, (4,))
    variants = [_variant(f"ratio {ratio}", ("model.memory.ratio", ratio)) for ratio in RATIOS]
    return _ablation({name: Arm(name=name, edits=edits) for name, edits in made.items()}, variants, steps, only)


def plain(steps: int = 500, only: str | None = None) -> Ablation:
    """Without beacons: the reader as it is, and trained further at the longer length, whole and in a window."""
    window = ("model.pattern[0].mixer.mask", Window(size=2 * WINDOW))
    made = {"trained": (), "trained, window": (window,)}
    named = {"reader": (), "reader, window": (window,)}
    arms = {name: Arm(name=name, edits=edits) for name, edits in made.items()}
    arms |= {name: Arm(name=name, edits=edits, model="reader") for name, edits in named.items()}
    return _ablation(arms, [_variant("none")], steps, only)


def _beacons(memory: ActivationBeacon, ratios: tuple[int, ...]) -> tuple:
    return (("model.memory", memory), ("objective", BeaconModeling(ratios=ratios)), ("trainable", OWN))


def _variant(method: str, *edits) -> Variant:
    return Variant(method=method, edits=edits, lengths=LENGTHS)


def _ablation(arms: dict[str, Arm], variants, steps: int, only: str | None) -> Ablation:
    arms = tuple(chosen(arms, only).values())
    return Ablation(
        base=base(steps) if any(arm.model is None for arm in arms) else None,
        arms=arms,
        variants=tuple(variants),
        tasks=(
            Perplexity(source=StandardLibrary(split="heldout"), windows=16),
            Retrieval(name="passkey", generator=Needles(), examples_each=32),
        ),
        panels=(
            Panel(
                title="held-out code, nats a byte in the last half", task="text", metric="nll", where=(("bucket", "last half"),)
            ),
            Panel(title="passkey, exact match", task="passkey", metric="exact"),
        ),
    )
