"""RoPE extension on a laptop: what happens to a byte model trained at 128 tokens when it reads 2, 4 and 8 times as far.

    python -m experiments.ablate --config=config:ablations.rope_extension.quickstart

Two arms, with and without a short convolution on the embeddings, are trained on the standard library's source mixed with
recall sequences; then none, linear interpolation, NTK and YaRN are compared zero-shot, and after a little fine-tuning at 4x.
All variants of an arm read the same parameters. Two training runs of 1.8 M tokens, eight fine-tunings of 0.06 M, 20 measured
variants an arm.

Expected. Retrieval, with the convolution, which takes care of local order: at 1x all find the needle; beyond, none falls first,
NTK holds longer, interpolation stays near 1 (the convolution hides its cost). Source code, without the convolution: zero-shot,
YaRN loses least, then NTK, while interpolation is no better than none, since it moves every neighbour; fine-tuned, it catches
up. YaRN paper (Peng et al. 2023): the same order for Llama-2 zero-shot; interpolation needs fine-tuning (Chen et al. 2023).

Measured, 450 steps an arm, 30 of fine-tuning, 4 min 6 s on two cores; at 128 / 256 / 512 / 1024, then fine-tuned at 512.

    needle, exact match, with the convolution      source code, nats a byte of the last half, without it
    none           1.00 0.64 0.23 0.11   0.53      1.58 2.06 2.75 3.16   1.69
    interpolation  1.00 0.97 0.84 0.56   1.00      1.58 2.23 2.58 2.85   1.92
    NTK            1.00 0.83 0.53 0.28   0.98      1.58 1.79 2.09 2.68   1.65
    YaRN           1.00 0.98 0.92 0.89   0.97      1.58 1.73 1.71 1.93   1.62

As expected, but for interpolation on text: better than none from 4x on, and not caught up after 30 steps. Without the
convolution 450 steps do not teach the model to retrieve (needle 0.00 at 128), so that arm speaks of text alone.
"""

from configs.models import byte
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles, Records
from lcx.data.sources import StandardLibrary
from lcx.evaluation.ablation import Ablation, Arm, Variant
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.positions.linear import LinearInterpolation
from lcx.positions.ntk import NTK
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant, Cosine

TRAINED = 128
SCALES = (1, 2, 4, 8)


def base(steps: int = 450) -> Experiment:
    """A 0.46 M parameter byte decoder on rows of 128 tokens: half source code, half recall.

    The few answer bytes of recall weigh ten times, so that each half matters.
    """
    return Experiment(
        model=byte.toy(width=128, layers=2),
        data=Pipeline(
            mixture=(
                Weighted(rows=PackedText(source=StandardLibrary(split="train")), weight=2.0),
                Weighted(rows=Needles(answer_weight=10.0)),
                Weighted(rows=Records(answer_weight=10.0)),
            ),
            length=TRAINED,
            batch_size=32,
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3, warmup=30)),
        steps=steps,
        checkpoint=Checkpointing(every=150),
        log_every=50,
    )


def quickstart(steps: int = 450, finetune_steps: int = 30) -> Ablation:
    """The whole comparison, in minutes on two cores."""
    finetune = (
        ("optimizer.learning_rate", Constant(peak=5e-4, warmup=5)),
        ("steps", finetune_steps),
        ("data.length", 4 * TRAINED),
        ("data.batch_size", 4),
        ("data.seed", 1),
    )
    zero_shot = [_variant(method, scale) for scale in SCALES for method in _methods(scale)]
    tuned = [_variant(method, 4, stage="fine-tuned", finetune=finetune) for method in _methods(4)]
    return Ablation(
        base=base(steps),
        arms=(Arm(name="convolution"), Arm(name="plain", edits=(("model.embed_mixer", None),))),
        variants=(*zero_shot, *tuned),
        tasks=(
            Perplexity(source=StandardLibrary(split="heldout"), windows=32),
            Retrieval(name="needle", generator=Needles(), examples_each=64),
            Retrieval(name="records", generator=Records(), examples_each=32),
        ),
        panels=(
            Panel(
                title="source code, nats a byte in the last half", task="text", metric="nll", where=(("bucket", "last half"),)
            ),
            Panel(title="needle, exact match", task="needle", metric="exact"),
            Panel(title="records, byte accuracy", task="records", metric="token_accuracy"),
        ),
    )


def _methods(scale: int) -> dict:
    return {
        "none": Rope(),
        "interpolation": LinearInterpolation(factor=float(scale)),
        "NTK": NTK(factor=float(scale)),
        "YaRN": YaRN(factor=float(scale), original_length=TRAINED),
    }


def _variant(method: str, scale: int, **options) -> Variant:
    edits = (("model.rope", _methods(scale)[method]),)
    return Variant(method=method, scale=float(scale), lengths=(scale * TRAINED,), edits=edits, **options)
