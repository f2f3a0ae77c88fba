"""Positions of video: a still picture behind flicker, learned from 8 frames of 3 by 3 and told from 8 to 64.

    python -m experiments.ablate --config='config:ablations.vision.still(way="HoPE")'

Each way to place videos trains a model of its own and is one command of some minutes; what it changes at test time alone
(slower rates, another stride) is a variant or a task of it. `lcx/data/still.py` says what is asked; chance is 1 / 36.

Expected: on one axis a cell is every ninth token, which no longer holds far beyond what was trained; rates slowed as for text
move the cells. On axes of their own a cell is in one place in all frames, so more frames tell more; and the more so, the less
time turns (HoPE's claim). M-RoPE gives columns the slowest channels, which hardly tell three of them apart; with base 16 a step
of a row turns as far, for its share of the picture, as in models that read pictures of 36 rows.

Measured at 8 / 64 frames, 1,200 steps, one seed (docs/results/vision.md): one axis 0.86 / 0.04, M-RoPE 0.26 / 0.17, with base
16 0.68 / 0.77, interleaved 0.93 / 1.00, VideoRoPE 0.79 / 0.10, HoPE 0.42 / 0.20, V2PE 0.88 / 0.06, FAR 0.95 / 1.00: as
expected, but for the diagonals of VideoRoPE and HoPE, on which a cell moves with time.
"""

from configs.ablations.arms import chosen
from lcx.channels.glu import GLU
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.still import Still
from lcx.evaluation.ablation import Ablation, Arm, Variant
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.positions.axial import AxialRope
from lcx.positions.flexrope import FlexRope
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.hope import HoPE
from lcx.positions.linear import LinearInterpolation
from lcx.positions.mrope_plus_plus import MRopePlusPlus
from lcx.positions.rope import Rope
from lcx.positions.visual import DiagonalPositions, FramePositions, MRopePositions, V2PEPositions, VisualPositions
from lcx.positions.yarn import YaRN
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Cosine

WIDTH, HEADS, DIM, SIDE, FRAMES = 64, 2, 32, 3, 8
TRAINED, SCALES = FRAMES * SIDE**2, (1, 2, 4, 8)
SECTIONS = (6, 5, 5)  # pairs of channels for time, rows and columns
MIXER = "model.pattern[0].mixer"


def still(way: str, steps: int = 1200) -> Ablation:
    """A model whose videos are placed in this way."""
    rope, trained, tested = chosen(_ways(), way)[way]
    return Ablation(
        base=base(rope, trained, steps),
        arms=(Arm(name=way),),
        variants=(Variant(method="none", lengths=tuple(n * TRAINED for n in SCALES)), *_slowed(way)),
        tasks=tuple(Retrieval(name=name, generator=picture(positions), examples_each=64) for name, positions in tested.items()),
        panels=tuple(Panel(title=f"{name}, cells of the picture", task=name, metric="token_accuracy") for name in tested),
    )


def base(rope: FrequencyRule, positions: VisualPositions | None, steps: int) -> Experiment:
    """Two layers that read whole videos."""
    mixer = Attention(heads=HEADS, kv_heads=HEADS, head_dim=DIM)
    layer = Layer(mixer=mixer, channel=GLU(hidden=2 * WIDTH))
    return Experiment(
        model=Decoder(vocab=264, width=WIDTH, pattern=(layer,), periods=2, unroll="all", rope=rope),
        data=Pipeline(mixture=(Weighted(rows=picture(positions)),), length=TRAINED, batch_size=32),
        optimizer=AdamW(learning_rate=Cosine(peak=4e-3, warmup=50, final=0.1), decay=0.01),
        steps=steps,
        checkpoint=Checkpointing(every=400),
        log_every=100,
    )


def picture(positions: VisualPositions | None) -> Still:
    return Still(height=SIDE, width=SIDE, positions=positions, loss="all", answer_weight=10.0)


def _ways() -> dict[str, tuple]:
    """By name: the rope, how videos are placed in training, and how in each task."""
    alike = lambda rope, positions: (rope, positions, {"still": positions})
    drawn, one = DiagonalPositions(gammas=(0.5, 0.75, 1.0, 1.25, 1.5)), DiagonalPositions()
    strides = {f"stride {stride} of 256": V2PEPositions(strides=(stride,)) for stride in (256, 64, 32)}
    return {
        "one axis": alike(Rope(), None),
        "M-RoPE": alike(Rope(sections=SECTIONS), MRopePositions()),
        "M-RoPE, base 16": alike(Rope(base=16.0, sections=SECTIONS), MRopePositions()),
        "M-RoPE, interleaved": alike(Rope(sections=SECTIONS, section_order="interleaved"), MRopePositions()),
        "VideoRoPE": alike(Rope(sections=SECTIONS, section_order="alternating"), DiagonalPositions(gammas=(2.0,))),
        "HoPE": (HoPE(sections=SECTIONS), drawn, {"still": one}),
        "V2PE": (Rope(), V2PEPositions(strides=(32, 64, 128, 256)), strides),
        "FAR": alike(AxialRope(sections=SECTIONS), FramePositions()),
    }


def _slowed(way: str) -> list[Variant]:
    """What is changed at test time alone, for so many times the trained frames."""
    rope = lambda rule: (("model.rope", rule),)
    methods = {
        "one axis": {
            "interpolation": lambda n: rope(LinearInterpolation(factor=float(n))),
            "YaRN": lambda n: rope(YaRN(factor=float(n), original_length=TRAINED)),
        },
        "M-RoPE, base 16": {
            f"M-RoPE++, {form}": lambda n, form=form: rope(
                MRopePlusPlus(base=16.0, factor=float(n), original_length=TRAINED, sections=SECTIONS, form=form)
            )
            for form in ("paper", "code")
        },
        "FAR": {"FlexRoPE": lambda n: ((f"{MIXER}.distance_bias", FlexRope(slope=0.1 / SIDE**2)),)},
    }
    return [
        Variant(method=method, scale=float(n), lengths=(n * TRAINED,), edits=edits(n))
        for method, edits in methods.get(way, {}).items()
        for n in SCALES[1:]
    ]
