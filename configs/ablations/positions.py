"""Every position method on one byte model trained at 128 tokens, read at 2, 4, 8 and 16 times as far.

    python -m experiments.ablate --config=config:ablations.positions.zero_shot
    python -m experiments.ablate --config=config:ablations.positions.fine_tuned
    python -m experiments.ablate --config=config:ablations.positions.passkeys
    python -m experiments.ablate --config=config:ablations.positions.dimensions
    python -m experiments.ablate --config=config:ablations.positions.trained_anew
    python -m experiments.ablate --config=config:ablations.positions.tables
    python -m experiments.ablate --config='config:ablations.positions.packed(only="anchor")'
    python -m experiments.ablate --config='config:ablations.positions.clex(equation="frozen")'

`zero_shot` measures all methods without training; `fine_tuned` trains each of the methods that need it, for a few steps at 512
tokens or, those with positions of their own, on rows of 128. Both read `copier`, shipped with the package, which

    python -m experiments.train --config=config:ablations.positions.copier --run_dir=runs/copier

makes: source code with random letters copied from afar, random strings in tiles. `passkeys` reads `reader`, which
was trained to find them in 512 tokens. All can be stopped and go on; rows are written as they come.

Expected, from a reference run of the same bench (one seed; text / copy at 512 tokens, zero-shot): none 3.20 / 3.85,
interpolation 3.01 / 3.36, NTK 2.70 / 4.26, YaRN 1.69 / 1.83, SelfExtend with log-n 1.50 / 0.39, ReRoPE with log-n 1.52 / 0.10.
Fine-tuned at 512: none 0.93 to copy, NTK 0.59, interpolation 0.33, YaRN 0.27, adjusted base 0.15.

Measured (docs/results/positions.md has all), the same: none 2.76 / 3.87, interpolation 2.80 / 3.28, NTK 2.03 / 3.27, YaRN
1.59 / 0.78, SelfExtend with log-n 1.40 / 0.46, ReRoPE with log-n 1.42 / 0.11; 1.31, 0.87, 0.50, 0.41, 0.28 fine-tuned.
Passkeys at 8,192 tokens: none 0.00, NTK 0.08, interpolation 0.62, SelfExtend 0.75, YaRN 0.96, ReRoPE with log-n 1.00.
DPE of half of the pairs, chosen: 1.44 / 1.76 at 512 tokens, of as many at random at best 1.86 / 3.05.
`trained_anew`, text / copy at 1,024: RoPE 2.89 / 4.33, xPos 1.90 / 3.73, ALiBi 1.78 / 1.87, windows with NoPE 1.69 / 3.34.
`tables`, at 512: interpolated 2.53 / 4.22, its new rows tuned 2.23 / 3.34.
"""

import dataclasses
from typing import Literal

from configs.ablations.arms import chosen
from configs.models import byte
from lcx.attention.mask import Window
from lcx.cache.dense import DenseCache
from lcx.data.continuous import Continuous
from lcx.data.copying import Copies, Tiles
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles
from lcx.data.rows import Joined
from lcx.data.skipped import Skipped
from lcx.data.sources import StandardLibrary
from lcx.evaluation.ablation import Ablation, Arm, Variant
from lcx.evaluation.key_dimensions import RANDOM
from lcx.evaluation.longrope_factors import harmonic, longrope
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.models.position_table import PositionTable
from lcx.positions.alibi import ALiBi
from lcx.positions.base_multiplier import BaseMultiplier
from lcx.positions.clex import CLEX
from lcx.positions.clex_positions import CLEXPositions
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.dprope import DPRoPE
from lcx.positions.dual_chunk import DualChunk
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.dynamic_yarn import DynamicYaRN
from lcx.positions.flexrope import FlexRope
from lcx.positions.linear import LinearInterpolation
from lcx.positions.llama3 import Llama3
from lcx.positions.long_heads import LongHeads
from lcx.positions.ntk import NTK
from lcx.positions.position_rule import ChunkSlots, DenseAndMoved, PoSE, RandomPositions, RandomSteps
from lcx.positions.power_basis import PowerBasis
from lcx.positions.proportional import Proportional
from lcx.positions.query_scale import LogLength, LogN, Stepped
from lcx.positions.rerope import ReRoPE
from lcx.positions.rope import Rope
from lcx.positions.self_extend import SelfExtend
from lcx.positions.truncated_basis import TruncatedBasis
from lcx.positions.xpos import XPos
from lcx.positions.yarn import YaRN
from lcx.spec import edits
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant, Cosine

TRAINED, LAYERS, HEAD_DIM = 128, 3, 32
READER = 512  # tokens that `reader` was trained at
SCALES = (1, 2, 4, 8, 16)
MIXER = "model.pattern[0].mixer"
# found by `python -m lcx.evaluation.longrope_factors copier 4`, on training text
FACTORS = (1.06, 1.09, 1.55, 1.71, 2.27, 3.69, 3.97, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.61, 4.81)
LOG_N = (f"{MIXER}.query_scale", LogN(original_length=TRAINED))


def copier(steps: int = 2600) -> Experiment:
    """A 0.39 M parameter byte decoder without a convolution, on rows of 128 tokens."""
    return edits(
        Experiment(
            model=byte.toy(width=96, layers=LAYERS),
            data=Pipeline(mixture=_mixture(longest=64, copies=12.0), length=TRAINED, batch_size=24),
            optimizer=AdamW(learning_rate=Cosine(peak=4e-3, warmup=50, final=0.1), decay=0.05),
            steps=steps,
            checkpoint=Checkpointing(every=200),
            log_every=100,
        ),
        [("model.embed_mixer", None)],
    )


def zero_shot(model: str = "copier", only: str | None = None) -> Ablation:
    """All methods, at each scale with the settings that its papers give for it; or only the named one."""
    return _ablation(model, _named(_untrained(TRAINED), only))


def fine_tuned(model: str = "copier", only: str | None = None) -> Ablation:
    """Methods after a little training: at 512 tokens (17 and 150 steps), or on rows of 128 (600 steps); or only one."""
    return _ablation(model, _named(_trained(), only))


def passkeys(model: str = "reader", only: str | None = None) -> Ablation:
    """All methods on the retrieval of a passkey from source code; or only the named one."""
    text = StandardLibrary(split="heldout")
    return Ablation(
        arms=(Arm(name="reader", model=model),),
        variants=tuple(_named(_untrained(READER), only)),
        tasks=(Retrieval(name="passkey", generator=Needles(haystack=text), examples_each=24),),
        panels=(Panel(title="passkey, exact match", task="passkey", metric="exact"),),
    )


def dimensions(model: str = "copier", folder: str = "runs/dimensions") -> Ablation:
    """DPE of chosen pairs of channels, of as many at random, of all and of none. First, for the files that it names,

    python -m lcx.evaluation.key_dimensions copier 8 runs/dimensions
    """
    variants = []
    for scale in (4, 8):
        every = DimensionGroups(groups=(2 * scale,) * 8, window=TRAINED // 2)
        named = lambda file, every=every: dataclasses.replace(every, dimensions=f"{folder}/{file}.npy")
        plans = {"DPE, equal groups": every, "DPE, chosen pairs": named("chosen")}
        plans |= {f"DPE, random pairs {seed}": named(f"random-{seed}") for seed in range(RANDOM)}
        edited = {"none": ()} | {method: ((f"{MIXER}.distances", plan),) for method, plan in plans.items()}
        for method, changes in edited.items():
            variants.append(Variant(method=method, scale=float(scale), lengths=(scale * TRAINED,), edits=changes))
    return _ablation(model, variants)


AT_HOME = ("none", "base 5e5", "power basis", "truncated basis", "ReRoPE", "SelfExtend", "FlexRoPE 0.01", "FlexRoPE 0.05")
FAR = (4 * TRAINED, 8 * TRAINED)


def _untrained(window: int) -> list[Variant]:
    variants = []
    for scale in SCALES:
        for method, changes in _zero_shot(scale, window).items():
            if scale > 1 or method in AT_HOME:
                variants.append(Variant(method=method, scale=float(scale), lengths=(scale * window,), edits=changes))
    return variants


def _named(variants: list[Variant], only: str | None) -> list[Variant]:
    """Those of one method, or all."""
    methods = dict.fromkeys(variant.method for variant in variants)
    return [variant for variant in variants if variant.method in chosen(methods, only)]


def _trained() -> list[Variant]:
    variants = []
    for steps_more, stage in ((17, "100 rows"), (150, "150 steps")):
        for method, (changes, more) in _tuned().items():
            tuning = (*_tuning(steps_more, 4 * TRAINED), *more)
            variants.append(Variant(method=method, stage=stage, scale=4.0, lengths=FAR, edits=changes, finetune=tuning))
    for method, (changes, more, scale) in _trained_short().items():
        tuning = (*_tuning(600, TRAINED), ("optimizer.learning_rate", Cosine(peak=5e-4, warmup=10)), *more)
        lengths = (TRAINED, *FAR) if scale == 8 else (4 * TRAINED,)
        variants.append(
            Variant(method=method, stage="short rows", scale=float(scale), lengths=lengths, edits=changes, finetune=tuning)
        )
    return variants


def clex(steps: int = 3000, equation: Literal["learned", "frozen"] = "learned") -> Ablation:
    """CLEX for five times as many steps, with its equation learned or left at NTK, where it begins."""
    changes, more, scale = _trained_short()["CLEX"]
    rates = ("optimizer.learning_rate", Cosine(peak=5e-4, warmup=10))
    frozen = (("trainable", ("embedding", "slots/*", "final_norm/*")),) if equation == "frozen" else ()
    tuning = (*_tuning(steps, TRAINED), rates, *more, *frozen)
    name, options = f"CLEX, equation {equation}", {"scale": float(scale), "lengths": (TRAINED, *FAR)}
    return _ablation("copier", [Variant(method=name, stage=f"{steps} steps", edits=changes, finetune=tuning, **options)])


def trained_anew(steps: int = 800, only: str | None = None) -> Ablation:
    """Models of four layers that have other positions from the start, read at up to 8 times their length; or only one of them.
    Three in four layers of the last two see 64 tokens with RoPE, one sees all without (Llama 4, Cohere 2)."""
    near = edits(copier().model.pattern[0], [("mixer.mask", Window(size=TRAINED // 2))])
    everywhere = edits(copier().model.pattern[0], [("mixer.rope", "none")])
    stepped = edits(everywhere, [("mixer.query_scale", Stepped(every=TRAINED, strength=0.5))])
    arms = {
        "RoPE": (),
        "xPos": (("model.rope", XPos(pairing="interleaved")),),
        "NoPE": (("model.rope", None),),
        "ALiBi": (("model.rope", None), (f"{MIXER}.distance_bias", ALiBi())),
        "half of the pairs": (("model.rope", Proportional(ratio=0.5)),),
        "half of the head": (("model.rope", Rope(rotary=0.5)),),
        "3 near, 1 NoPE": (("model.pattern", (near, near, near, everywhere)), ("model.periods", 1)),
        "3 near, 1 NoPE, stepped": (("model.pattern", (near, near, near, stepped)), ("model.periods", 1)),
    }
    text = StandardLibrary(split="heldout")
    return Ablation(
        base=edits(copier(steps), [("model.periods", 4)]),
        arms=tuple(Arm(name=name, edits=changes) for name, changes in chosen(arms, only).items()),
        variants=tuple(Variant(method="none", scale=float(n), lengths=(n * TRAINED,)) for n in SCALES[:4]),
        tasks=(
            Perplexity(source=text, windows=16),
            Retrieval(name="copy", generator=Copies(haystack=text, far=TRAINED), examples_each=24),
        ),
        panels=_panels(),
    )


def tables(steps: int = 800) -> Ablation:
    """A model with a learned table of 128 places instead, read further as LongEmbed reads encoders."""
    table = lambda **options: (("model.position_table", PositionTable(rows=TRAINED, **options)),)
    variants = [Variant(method="none", lengths=(TRAINED,))]
    for scale in (2, 4):
        ways = {reading: table(reading=reading) for reading in ("grouped", "recurrent")}
        ways["interpolated"] = table(reading="interpolated", factor=scale)
        lengths = (scale * TRAINED,)
        variants += [Variant(method=way, scale=float(scale), lengths=lengths, edits=changes) for way, changes in ways.items()]
    tuned = table(reading="interpolated", factor=4, between="learned")
    tuning = (
        ("trainable", ("position_table/between",)),
        ("optimizer.learning_rate", Constant(peak=3e-3, warmup=10)),
        ("optimizer.decay", 0.0),
        ("steps", 400),
        ("data.positions", PoSE(target=4 * TRAINED, chunks=1)),
        ("data.seed", 1),
    )
    variants.append(Variant(method="interpolated, tuned", scale=4.0, lengths=FAR[:1], edits=tuned, finetune=tuning))
    anew = trained_anew(steps)
    arm = Arm(name="table", edits=(("model.rope", None), *table()))
    return edits(anew, [("arms", (arm,)), ("variants", tuple(variants))])


def packed(steps: int = 1000, only: str | None = None) -> Ablation:
    """Models that learn from rows of four documents, by what a token sees and how its places are counted (AnchorAttention);
    or only the named one. All read documents alone afterwards."""
    rows = [Joined(rows_of=weighted.rows, parts=4) for weighted in _mixture(longest=64, copies=12.0)]
    through = lambda sees: [Continuous(rows_of=row, sees=sees) for row in rows]
    ways = {"counted anew": rows, "own document": through("own document"), "whole row": through("whole row")}
    ways["anchor"] = through("anchor")
    arms = {
        name: (*((f"data.mixture[{n}].rows", row) for n, row in enumerate(found)), ("data.length", 512 + (name == "anchor")))
        for name, found in ways.items()
    }
    return edits(
        trained_anew(steps),
        [
            ("base", edits(copier(steps), [("data.length", 512), ("data.batch_size", 6), ("model.documents", 4)])),
            ("arms", tuple(Arm(name=name, edits=changes) for name, changes in chosen(arms, only).items())),
        ],
    )


def _panels() -> tuple[Panel, ...]:
    last = (("bucket", "last half"),)
    return (
        Panel(title="source code, nats a byte in the last half", task="text", metric="nll", where=last),
        Panel(title="copied from afar, nats a byte", task="copy", metric="nll"),
    )


def _mixture(longest: int, copies: float) -> tuple[Weighted, ...]:
    text = StandardLibrary(split="train")
    return (
        Weighted(rows=Copies(haystack=text, loss="all"), weight=copies),
        Weighted(rows=Tiles(longest=longest, loss="all"), weight=9.0),
        Weighted(rows=Needles(haystack=text, loss="all"), weight=3.0),
    )


def _zero_shot(scale: int, trained: int = TRAINED) -> dict[str, tuple]:
    """Edits by method. Groups as in the reference bench: 2 T / L, in windows of half the trained length."""
    factor, group, window = float(scale), max(1, 2 * scale), trained // 2
    log_n = (f"{MIXER}.query_scale", LogN(original_length=trained))
    log_length = (f"{MIXER}.query_scale", LogLength(original_length=trained))
    rope = lambda rule: (("model.rope", rule),)
    by_length = lambda rule: (*rope(rule), (f"{MIXER}.cache", DenseCache(keys="raw")))
    plan = lambda distances: ((f"{MIXER}.distances", distances),)
    factors = harmonic(Rope(), HEAD_DIM, trained=trained, scale=factor)
    methods = {
        "none": (),
        "sliding window": ((f"{MIXER}.mask", Window(size=trained)),),
        "interpolation": rope(LinearInterpolation(factor=factor)),
        "NTK": rope(NTK(factor=factor)),
        "NTK at twice": rope(NTK(factor=2 * factor)),
        "dynamic NTK": by_length(DynamicNTK(original_length=trained)),
        "by parts": rope(YaRN(factor=factor, original_length=trained, temperature="none")),
        "YaRN": rope(YaRN(factor=factor, original_length=trained)),
        "YaRN by rotations": rope(YaRN(factor=factor, original_length=trained, ramp="rotations")),
        "dynamic YaRN": by_length(DynamicYaRN(original_length=trained)),
        "Llama 3": rope(Llama3(factor=factor, original_length=trained, base=1e4)),
        "Llama 3 with temperature": rope(YaRN(factor=factor, original_length=trained, ramp="rotations", slow=1.0, fast=4.0)),
        "LongRoPE, harmonic": by_length(longrope(Rope(), factors, trained=trained, scale=factor)),
        "DPRoPE": rope(DPRoPE(factor=factor, original_length=trained)),
        "LongLLaDA": rope(BaseMultiplier(multiplier="auto", original_length=trained, target_length=scale * trained)),
        "base 5e5": rope(Rope(base=5e5)),
        "power basis": rope(PowerBasis()),
        "truncated basis": rope(TruncatedBasis(original_length=trained)),
        "log-n": (log_n,),
        "log of the length": (log_length,),
        "ReRoPE, log of the length": (*plan(ReRoPE(window=window)), log_length),
        "ReRoPE": plan(ReRoPE(window=window)),
        "ReRoPE, log-n": (*plan(ReRoPE(window=window)), log_n),
        "Leaky ReRoPE": plan(ReRoPE(window=window, leak=float(group))),
        "SelfExtend": plan(SelfExtend(group=group, window=window)),
        "SelfExtend, log-n": (*plan(SelfExtend(group=group, window=window)), log_n),
        "DPE, equal groups": plan(DimensionGroups(groups=(group,) * 8, window=window)),
        "DPE, fastest unscaled": plan(DimensionGroups(groups=(1,) + (group,) * 7, window=window)),
        "dual chunk": plan(DualChunk(chunk=5 * trained // 8, clip=3 * trained // 4)),
        "LongHeads": plan(LongHeads(chunk=trained // 8, chunks=8)),
        "FlexRoPE 0.01": ((f"{MIXER}.distance_bias", FlexRope(slope=0.01)),),
        "FlexRoPE 0.05": ((f"{MIXER}.distance_bias", FlexRope(slope=0.05)),),
    }
    if (scale, trained) == (4, TRAINED):
        for name, kept in (("LongRoPE, searched", 0), ("LongRoPE, searched, 4 kept", 4)):
            methods[name] = by_length(longrope(Rope(), FACTORS, trained=trained, scale=factor, kept=kept))
    return methods


def _tuned() -> dict[str, tuple]:
    """Edits by method, and more edits of its fine-tuning."""
    zero_shot, skipping = _zero_shot(4), LogN(original_length=TRAINED, skip_layers=2)
    same = ("none", "interpolation", "NTK", "by parts", "YaRN", "DPRoPE", "base 5e5", "power basis", "truncated basis")
    found = {method: (zero_shot[method], ()) for method in same}
    found["Entropy-ABF"] = ((*zero_shot["base 5e5"], (f"{MIXER}.query_scale", skipping)), ())
    found["Entropy-ABF, every layer"] = ((*zero_shot["base 5e5"], LOG_N), ())
    return found


def _trained_short() -> dict[str, tuple]:
    """Methods trained on rows of 128 tokens: edits to measure with, and more of the training, by scale where they differ."""
    clex = CLEX(original_length=TRAINED, largest=8)
    raw = (f"{MIXER}.cache", DenseCache(keys="raw"))
    by_scale = lambda scale: (("model.rope", LinearInterpolation(factor=float(scale))),)
    pose = ("data.positions", PoSE(target=8 * TRAINED))
    yarn = YaRN(factor=8.0, original_length=TRAINED)
    skipped = tuple(
        (f"data.mixture[{n}].rows", Skipped(rows_of=weighted.rows, target=8 * TRAINED))
        for n, weighted in enumerate(_mixture(longest=64, copies=12.0))
    )
    dense = ("data.positions", DenseAndMoved(densest=8, original_length=TRAINED, shared="batch"))
    spread = ("data.positions", CLEXPositions(original_length=TRAINED, largest=8, shared="batch"))
    return {
        "interpolation, plain rows": (by_scale(8), (), 8),
        "PoSE, interpolation": (by_scale(8), (pose,), 8),
        "PoSE, YaRN": ((("model.rope", yarn),), (pose,), 8),
        "random positions, YaRN": ((("model.rope", yarn),), (("data.positions", RandomPositions(target=8 * TRAINED)),), 8),
        "LOGO slots, interpolation": (by_scale(8), (("data.positions", ChunkSlots(target=8 * TRAINED)),), 8),
        "E2-LLM": (by_scale(4), (("model.rope", Rope()), dense), 4),
        "E2-LLM at 8": (by_scale(8), (("model.rope", Rope()), dense), 8),
        "CLEX": ((("model.rope", clex), raw), (spread,), 8),
        "random steps, interpolation": (by_scale(8), (("data.positions", RandomSteps()),), 8),
        "skipped text, interpolation": (by_scale(8), skipped, 8),
    }


def _tuning(steps: int, length: int) -> tuple:
    return (
        ("optimizer.learning_rate", Constant(peak=5e-4, warmup=min(10, steps // 2))),
        ("optimizer.decay", 0.0),
        ("steps", steps),
        ("data.length", length),
        ("data.batch_size", 24 * TRAINED // length),
        ("data.mixture", _mixture(longest=length // 2, copies=12.0)),
        ("data.seed", 1),
    )


def _ablation(model: str, variants: list[Variant]) -> Ablation:
    text = StandardLibrary(split="heldout")
    return Ablation(
        arms=(Arm(name="copier", model=model),),
        variants=tuple(variants),
        tasks=(
            Perplexity(source=text, windows=16),
            Retrieval(name="copy", generator=Copies(haystack=text, far=TRAINED), examples_each=24),
        ),
        panels=_panels(),
    )
