"""Positions of video on synthetic frames: trained on 5 to 8 of them, asked about up to 64.

    python -m experiments.ablate --config=config:ablations.visual_positions.one_axis
    python -m experiments.ablate --config=config:ablations.visual_positions.m_rope
    python -m experiments.ablate --config=config:ablations.visual_positions.video_rope
    python -m experiments.ablate --config=config:ablations.visual_positions.hope
    python -m experiments.ablate --config=config:ablations.visual_positions.v2pe
    python -m experiments.ablate --config=config:ablations.visual_positions.far
    python -m experiments.ablate --config=config:ablations.visual_positions.visual_window

A frame is 3 by 3 random symbols, a token each; questions behind the video name a symbol that it has once and ask what stands
at its place in the next frame (`lcx.data.frames`). A question is 1 in 36 by chance.

Expected of the papers at lengths beyond training: HoPE above VideoRoPE above M-RoPE above one axis (HoPE 2025); M-RoPE++ above
interpolation (GIRAFFE 2025); V2PE with a smaller step where one place a token leaves the trained range (2024); YaRN by the
visual window above YaRN by the text's (2024).
"""

import dataclasses

from configs.models import byte
from lcx.data.copying import Copies, Tiles
from lcx.data.frames import Frames
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles
from lcx.data.rows import Joined
from lcx.data.sources import StandardLibrary
from lcx.evaluation.ablation import Ablation, Arm, Variant
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.positions.axial import AxialRope
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.hope import HoPE
from lcx.positions.linear import LinearInterpolation
from lcx.positions.mrope_plus_plus import MRopePlusPlus
from lcx.positions.ntk import NTK
from lcx.positions.rope import Rope
from lcx.positions.visual import DiagonalPositions, FramePositions, MRopePositions, V2PEPositions, VisualPositions
from lcx.positions.yarn import YaRN
from lcx.spec import edits
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import WSD

FRAMES, SIDE = 8, 3  # most in training, of 3 by 3 symbols
SIZE, ASKED = SIDE**2, 16
QUESTIONS = 3 * ASKED  # tokens of one for each symbol
VISUAL = FRAMES * SIZE
LENGTH = VISUAL + QUESTIONS
SECTIONS = (2, 3, 3)  # of 8 pairs: the 16, 24 and 24 of 64
FAR = (16, 32, 64)


def one_axis(steps: int = 2000) -> Ablation:
    """Tokens counted through: the baseline of all."""
    extended = {
        "interpolation": lambda scale: LinearInterpolation(factor=scale),
        "NTK": lambda scale: NTK(factor=scale),
        "YaRN": lambda scale: YaRN(factor=scale, original_length=VISUAL),
    }
    return _ablation("one axis", Rope(), None, extended, steps)


def m_rope(steps: int = 2000) -> Ablation:
    """Qwen2-VL's three axes, and ways to extend them."""
    shared = {"sections": SECTIONS}
    extended = {
        "interpolation": lambda scale: LinearInterpolation(factor=scale, **shared),
        "NTK": lambda scale: NTK(factor=scale, **shared),
        "M-RoPE++": lambda scale: MRopePlusPlus(factor=scale, original_length=VISUAL, **shared),
        "M-RoPE++, code": lambda scale: MRopePlusPlus(factor=scale, original_length=VISUAL, form="code", **shared),
    }
    return _ablation("M-RoPE", Rope(**shared), MRopePositions(), extended, steps)


def video_rope(steps: int = 2000) -> Ablation:
    """Slow channels for time, places along the diagonal, frames two places apart."""
    rope = Rope(sections=SECTIONS, section_order="alternating")
    return _ablation("VideoRoPE", rope, DiagonalPositions(gammas=(2.0,)), {}, steps)


def hope(steps: int = 2000) -> Ablation:
    """No rotation in the slow channels; frames 0.5 to 1.5 places apart in training, one afterwards."""
    trained, read = DiagonalPositions(gammas=(0.5, 0.75, 1.0, 1.25, 1.5)), DiagonalPositions()
    return _ablation("HoPE", HoPE(sections=SECTIONS), trained, {}, steps, read=read)


def v2pe(steps: int = 2000, stride: int = 256) -> Ablation:
    """One axis with steps of 1/256 to 1 a visual token in training, `stride`/256 afterwards."""
    return _ablation(f"V2PE, stride {stride}", Rope(), V2PEPositions(), {}, steps, read=V2PEPositions(strides=(stride,)))


def far(steps: int = 2000) -> Ablation:
    """Frame, row and column, each a ladder of its own."""
    return _ablation("FAR", AxialRope(sections=SECTIONS), FramePositions(), {}, steps)


def visual_window(steps: int = 2000) -> Ablation:
    """Text learned to four times the length of the videos; YaRN by the visual window and by the text's."""
    text = StandardLibrary(split="train")
    length = 4 * LENGTH
    films = Joined(rows_of=_films(None), parts=4)
    mixture = (
        Weighted(rows=films, weight=12.0),
        Weighted(rows=Copies(haystack=text, loss="all"), weight=6.0),
        Weighted(rows=Tiles(longest=length // 2, loss="all"), weight=3.0),
        Weighted(rows=Needles(haystack=text, loss="all"), weight=3.0),
    )
    extended = {
        "YaRN, visual window": lambda scale: YaRN(factor=scale, original_length=VISUAL),
        "YaRN, text window": lambda scale: YaRN(factor=max(1.0, scale / 4), original_length=4 * VISUAL),
    }
    ablation = _ablation("text to 512", Rope(), None, extended, steps)
    data = Pipeline(mixture=mixture, length=length, batch_size=8)
    return edits(ablation, [("base.data", data)])


def _ablation(
    name: str,
    rope: FrequencyRule,
    trained: VisualPositions | None,
    extended: dict,
    steps: int,
    *,
    read: VisualPositions | None = None,
) -> Ablation:
    at = lambda frames: frames * SIZE + QUESTIONS
    variants = [Variant(method="none", lengths=tuple(map(at, (FRAMES, *FAR))))]
    for frames in FAR:
        for method, rule in extended.items():
            scale = frames / FRAMES
            changes = (("model.rope", rule(scale)),)
            variants.append(Variant(method=method, scale=scale, lengths=(at(frames),), edits=changes))
    films = dataclasses.replace(_films(read or trained), frames=None)
    return Ablation(
        base=_base(rope, trained, steps),
        arms=(Arm(name=name),),
        variants=tuple(variants),
        tasks=(Retrieval(name="next", generator=films, examples_each=16),),
        panels=(Panel(title="the next frame's symbol, exact", task="next", metric="exact"),),
    )


def _base(rope: FrequencyRule, rule: VisualPositions | None, steps: int) -> Experiment:
    return edits(
        Experiment(
            model=byte.toy(width=64, layers=2),
            data=Pipeline(mixture=(Weighted(rows=_films(rule)),), length=LENGTH, batch_size=32),
            optimizer=AdamW(learning_rate=WSD(peak=3e-3, warmup=100, decay=300), decay=0.05),
            steps=steps,
            checkpoint=Checkpointing(every=200),
            log_every=100,
        ),
        [
            ("model.embed_mixer", None),
            ("model.rope", rope),
            ("model.pattern[0].mixer.heads", 4),
            ("model.pattern[0].mixer.kv_heads", 4),
            ("model.pattern[0].mixer.head_dim", 16),
        ],
    )


def _films(rule: VisualPositions | None) -> Frames:
    return Frames(height=SIDE, width=SIDE, frames=(5, FRAMES), asked=ASKED, steps=("next",), positions=rule)
