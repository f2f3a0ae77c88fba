"""Memories at scale on TPU slices: whole training steps; those that are compiled fit their chips (docs/pods.md).

    python -m experiments.plan --config=config:pods.memory.beacon_llama2_7b_16k --topology=v5e:8x8

A Titans layer shares a row out over the devices, its memory's heads too. Beacons and what HMT recalls are added to a frozen
model, and trained alone. The text is the standard library's, for want of a corpus: set data.
"""

import dataclasses

from configs.models import llama, qwen
from lcx.attention.mask import Window
from lcx.attention.ring import Ring
from lcx.channels.glu import GLU
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import StandardLibrary
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.hmt import HMT
from lcx.mixers.attention import Attention
from lcx.mixers.neural_memory import NeuralMemory
from lcx.mixers.titans import TitansMAG
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.objectives.beacon_modeling import BeaconModeling
from lcx.objectives.language_modeling import LanguageModeling
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.spec import edits
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant, Cosine

RATIOS = (2, 4, 8, 16, 32)  # drawn in the paper's first stage
BEACONS = ("memory/*", "*/beacon_*")  # parameters that are trained
SPREAD = Rules(batch=("data",), sequence=("context",), width=("fsdp", "context"), vocab=())
NESTED = dataclasses.replace(SPREAD, sequence=("fsdp", "context"))  # groups of 8 that the compiler finds routes for


def titans_760m_2m() -> Experiment:
    """Titans MAG of 0.75 B parameters at 2,097,152 tokens on `v5p:2x2x4`: a memory head a device."""
    width, heads = 1536, 16
    near = Attention(heads=heads, kv_heads=heads, head_dim=width // heads, mask=Window(size=4096), persistent=4)
    memory = NeuralMemory(heads=heads, head_dim=width // heads, expand=2, chunk=64)
    model = Decoder(
        vocab=32000,
        width=width,
        pattern=(Layer(mixer=TitansMAG(attention=near, memory=memory), channel=GLU(hidden=4096)),),
        periods=16,
        head="untied",
        compute="bfloat16",
        remat="full",
        channel_chunk=16384,
        rules=SPREAD,
        communication=Ring(),
    )
    optimizer = AdamW(learning_rate=Cosine(peak=4e-4, warmup=100), decay=0.1)
    return Experiment(
        model=model,
        data=_text(1 << 21, 1, most=1),
        optimizer=optimizer,
        steps=1000,
        objective=LanguageModeling(parts=5),
        mesh=MeshSpec(context=16),
    )


def beacon_llama2_7b_16k() -> Experiment:
    """Activation Beacon on Llama-2-7B, windows of 1,024, rows of 16,384 tokens on `v5e:8x8`, one a device."""
    return _beacons(llama.llama2_7b(), 1024, 1 << 14, MeshSpec(fsdp=64), rows=64)


def beacon_llama2_7b_400k() -> Experiment:
    """The same at 393,216 tokens, which its 4,096 positions hold at ratio 128, on `v5e:8x8`: a row of all devices."""
    return _beacons(llama.llama2_7b(), 1024, 384 << 10, MeshSpec(fsdp=8, context=8), rows=1, ratios=(128,))


def beacon_qwen2_7b_16k() -> Experiment:
    """Activation Beacon on Qwen2-7B, windows of 2,048, rows of 16,384 tokens on `v5e:8x8`, one a device."""
    return _beacons(qwen.qwen2_7b(), 2048, 1 << 14, MeshSpec(fsdp=64), rows=64, parts=6)


def beacon_qwen2_7b_400k() -> Experiment:
    """The same at 393,216 tokens, at ratios 16 and 32, on `v5e:8x8`: a row of all devices."""
    return _beacons(qwen.qwen2_7b(), 2048, 384 << 10, MeshSpec(fsdp=8, context=8), rows=1, ratios=(16, 32), parts=6)


def hmt_llama2_7b() -> Experiment:
    """HMT on Llama-2-7B: eight segments of 1,024 tokens a row, two of them a group of gradients, on `v5e:8x8`."""
    memory = HMT(segment=1024, sensory=32, bank=300, size=4096, bptt=2)
    model = edits(llama.llama2_7b(), [("memory", memory), ("documents", 1)])
    return Experiment(
        model=model,
        data=_text(8 << 10, 64, most=1),
        optimizer=AdamW(learning_rate=Constant(peak=1e-4)),
        steps=600,
        objective=LanguageModeling(parts=5),
        mesh=MeshSpec(fsdp=64),
        trainable=("memory/*",),
    )


def _beacons(
    model: Decoder, window: int, length: int, mesh: MeshSpec, rows: int, ratios: tuple[int, ...] = RATIOS, parts: int = 5
) -> Experiment:
    memory = ActivationBeacon(window=window, ratio=ratios[-1], ratios=ratios)
    rules = NESTED if mesh.context > 1 else model.rules
    model = edits(model, [("memory", memory), ("rules", rules), ("communication", Ring()), ("channel_chunk", 4096)])
    return Experiment(
        model=model,
        data=_text(length, rows),
        optimizer=AdamW(learning_rate=Constant(peak=5e-5, warmup=100)),
        steps=10_000,
        objective=BeaconModeling(ratios=ratios, parts=parts),
        mesh=mesh,
        trainable=BEACONS,
    )


def _text(length: int, rows: int, most: int | None = None) -> Pipeline:
    text = PackedText(source=StandardLibrary(split="train"), most=most)
    return Pipeline(mixture=(Weighted(rows=text),), length=length, batch_size=rows)
