"""Memories of constant size beside attention: keys bound anew again and again, asked for behind all of it.

    python -m experiments.ablate --config=config:ablations.memory.bindings
    python -m experiments.ablate --config=config:ablations.memory.needles
    python -m experiments.ablate --config=config:ablations.memory.equal_bytes
    python -m experiments.ablate --config=config:ablations.memory.text
    python -m experiments.ablate --config=config:ablations.memory.titans
    python -m experiments.ablate --config='config:ablations.memory.bindings(only="gated DeltaNet")'     # one arm, minutes

`bindings`: two layers of width 64, one arm a memory, trained on rows of 128 tokens in which each of 8 letters is bound to a
digit about four times, and asked for as often. Measured at 128 to 2,048 tokens, 8 to 128 windows of 16 tokens, in which keys
are bound as many times more. Chance is 0.10. `needles`: the letters are bound once, at the beginning of a row, and asked for
among other letters, at 32 to 2,048 tokens, one to 64 segments of memories between segments. `equal_bytes`: needles, each
memory of 64 kB. `text`: the same models trained on rows of 512 bytes of source code, one document each, and measured at 512
to 8,192. `titans`: the paper's three ways to join memory and attention, and the memory with each of its parts taken away.

Expected: a sum of all pairs (linear attention) loses as more is written; forgetting helps, overwriting (delta rules) more. Of
needles a window knows nothing; Titans (paper) is ahead of gated DeltaNet, HMT (paper) of RMT.

Measured at 128 / 512 / 2,048 tokens, 600 steps, one seed (docs/results/memory.md): full attention 1.00 0.97 0.91, window 0.76
0.76 0.76, linear attention 0.68 0.42 0.26, gated 0.83 0.80 0.79, DeltaNet 1.00 0.99 0.99, gated DeltaNet 0.99 0.99 0.99,
Infini-attention 0.90 0.80 0.78, TTT-Linear 0.86 0.84 0.75, RMT 0.92 0.85 0.80. Titans: LMM of one matrix, steps at each token,
1.00 0.99 0.99, with chunks of 16 0.93 0.93 0.92; of two matrices 0.37 0.22 0.18, MAC 0.62 0.54 0.44, MAG 0.75 0.74 0.74 before
the first matrix began larger (0.45 0.31 0.23, 0.58 0.52 0.45, 0.73 0.75 0.75 since): not in the paper's order.
`needles`, 1,800 steps: full attention 1.00 0.70 0.30, TTT-Linear 1.00 1.00 0.99, TTT-MLP 1.00 1.00 1.00, Titans MAG 1.00 1.00
0.99, LMM 1.00 1.00 0.85, MAL 0.54 0.20 0.11, AutoCompressor 0.82 0.70 0.35, DeltaNet 0.95 0.95 0.93, linear attention 0.95
0.96 0.93, gated DeltaNet 0.62 0.56 0.40, RMT 0.94 0.72 0.26, HMT 0.55 0.40 0.40, Activation Beacon 0.46 0.34 0.33,
Infini-attention 0.99 0.95 0.88, Titans MAC 0.21 0.17 0.14, window 0.21 0.12 0.11: MAG ahead of LMM and gated DeltaNet, HMT of
RMT where it is far, as in the papers; not MAC. `equal_bytes`, at 128 / 512 / 2,048: window of 64 1.00 0.42 0.29, linear
attention 0.99 0.98 0.97, DeltaNet 0.74 0.72 0.46, gated DeltaNet 0.68 0.70 0.43, TTT-Linear 1.00 1.00 0.91, Titans LMM 1.00
1.00 0.98, of one matrix 0.66 0.38 0.14, MAG 0.69 0.35 0.15, RMT 0.98 0.54 0.22, HMT 0.54 0.40 0.39, AutoCompressor 0.82 0.39
0.22, Infini-attention 0.58 0.34 0.10, Activation Beacon 0.40 0.18 0.10. `text`, nats a byte at 512 / 8,192: full attention
1.41 1.72, window 1.42 1.41, gated DeltaNet 1.38 1.37, DeltaNet 1.42 1.42, HMT 1.43 1.42, RMT 1.52 1.49, Titans MAG 1.37 1.63,
MAC 1.46 1.66, LMM 1.46 1.94, TTT-Linear 1.44 1.60, Activation Beacon 1.47 1.82. Titans' parts: MAG without one of them stays
between 0.70 and 0.73 at 128, and falls at 2,048 without its convolution alone (0.65 for 0.75).
"""

import dataclasses

from configs.ablations.arms import chosen
from lcx.attention.mask import Chunk, Window
from lcx.channels.glu import GLU
from lcx.data.bindings import Bindings
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import StandardLibrary
from lcx.evaluation.ablation import Ablation, Arm, Variant
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.auto_compressor import AutoCompressor
from lcx.memory.hmt import HMT
from lcx.memory.rmt import RMT
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.mixers.infini_attention import InfiniAttention
from lcx.mixers.mixer import Mixer
from lcx.mixers.neural_memory import NeuralMemory
from lcx.mixers.short_convolution import ShortConvolution
from lcx.mixers.titans import TitansMAG, TitansMAL
from lcx.mixers.titans_mac import TitansMAC
from lcx.mixers.ttt import TTT
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.spec import edits
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Cosine

WIDTH, HEADS, DIM, WINDOW, TRAINED = 64, 2, 32, 16, 128
LENGTHS = (128, 256, 512, 1024, 2048)
FAR = (512, 2048, 8192)

TASK = Bindings(keys=8)
NEEDLES, DISTANCES = Bindings(keys=8, asked=0.2, anew=False), (32, *LENGTHS)

FULL = Attention(heads=HEADS, kv_heads=HEADS, head_dim=DIM)
NEAR = dataclasses.replace(FULL, mask=Window(size=WINDOW))
HELD = dataclasses.replace(NEAR, persistent=4)
MEMORY = NeuralMemory(heads=HEADS, head_dim=DIM, expand=2, chunk=WINDOW)


def base(mixer: Mixer = NEAR, steps: int = 600, task: Bindings = TASK) -> Experiment:
    """Two layers of one mixer behind a convolution of the embeddings, which shows a value its key."""
    return Experiment(
        model=Decoder(
            vocab=264,
            width=WIDTH,
            pattern=(Layer(mixer=mixer, channel=GLU(hidden=2 * WIDTH)),),
            periods=2,
            unroll="all",
            embed_mixer=ShortConvolution(taps=2),
        ),
        data=Pipeline(mixture=(Weighted(rows=task),), length=TRAINED, batch_size=32),
        optimizer=AdamW(learning_rate=Cosine(peak=4e-3, warmup=50, final=0.1), decay=0.01),
        steps=steps,
        checkpoint=Checkpointing(every=300),
        log_every=50,
    )


def bindings(steps: int = 600, only: str | None = None) -> Ablation:
    """One arm a memory; or only the named one."""
    return _ablation({**_mixers(), **_between()}, steps, only)


def needles(steps: int = 1800, only: str | None = None) -> Ablation:
    """The same arms; or only the named one."""
    return _ablation({**_mixers(), **_between()}, steps, only, NEEDLES, DISTANCES)


def equal_bytes(steps: int = 1800, only: str | None = None) -> Ablation:
    """Needles again, each memory as large as 64 kB of state in use allow, of both layers; or only the named arm."""
    return _ablation(_of_64_kb(), steps, only, NEEDLES, DISTANCES)


def text(steps: int = 1000, only: str | None = None) -> Ablation:
    """The same arms on source code; or only the named one."""
    code = lambda split: StandardLibrary(split=split)
    data = Pipeline(mixture=(Weighted(rows=PackedText(source=code("train"), most=1)),), length=512, batch_size=8)
    return dataclasses.replace(
        bindings(steps, only),
        base=edits(base(steps=steps), [("data", data)]),
        variants=(Variant(method="trained", lengths=FAR),),
        tasks=(Perplexity(source=code("heldout"), windows=16),),
        panels=(
            Panel(title="code, nats a byte in the last half", task="text", metric="nll", where=(("bucket", "last half"),)),
        ),
    )


def titans(steps: int = 600, only: str | None = None) -> Ablation:
    """The three ways, and the memory without each part; or only the named arm."""
    exact = {"depth": 1, "network": "plain", "gradient": "token", "overshoot": None}
    less = lambda **changes: _mixer(TitansMAG(attention=HELD, memory=dataclasses.replace(MEMORY, **changes)))
    arms = {
        "MAC": _mixer(_mac()),
        "MAG": less(),
        "MAL": _mixer(TitansMAL(attention=HELD, memory=MEMORY)),
        "LMM": _mixer(MEMORY),
        "LMM, plain network": _mixer(dataclasses.replace(MEMORY, network="plain")),
        "LMM, chunks of 4": _mixer(dataclasses.replace(MEMORY, chunk=4)),
        "LMM, steps at each token": _mixer(dataclasses.replace(MEMORY, **exact)),
        "LMM, one matrix": _mixer(dataclasses.replace(MEMORY, depth=1, network="plain")),
        "MAC, steps at each token": _mixer(_mac(**exact)),
        "MAG, one matrix": less(depth=1, network="plain"),
        "MAG, no forgetting": less(decay=False),
        "MAG, no momentum": less(momentum=False),
        "MAG, no convolution": less(taps=0),
        "MAG, no persistent tokens": _mixer(TitansMAG(attention=NEAR, memory=MEMORY)),
        "MAG, steps at each token": less(**exact),
    }
    return _ablation(arms, steps, only)


def _ablation(arms: dict, steps: int, only: str | None, task: Bindings = TASK, lengths: tuple = LENGTHS) -> Ablation:
    arms = chosen(arms, only)
    return Ablation(
        base=base(steps=steps, task=task),
        arms=tuple(Arm(name=name, edits=edits) for name, edits in arms.items()),
        variants=(Variant(method="trained", lengths=lengths),),
        tasks=(Retrieval(name="bindings", generator=task, examples_each=32),),
        panels=(Panel(title="value of a key, accuracy", task="bindings", metric="token_accuracy"),),
    )


def _mixer(mixer: Mixer) -> tuple:
    """Edits to two layers of it."""
    return (("model.pattern[0].mixer", mixer),)


def _mac(**changes) -> TitansMAC:
    return TitansMAC(attention=dataclasses.replace(FULL, persistent=4), memory=dataclasses.replace(MEMORY, **changes))


def _mixers() -> dict:
    delta = lambda **form: _mixer(GatedDeltaNet(heads=HEADS, head_dim=DIM, value_dim=DIM, chunk=WINDOW, **form))
    return {
        "full attention": _mixer(FULL),
        "window": _mixer(NEAR),
        "linear attention": delta(rule="sum", decay="none"),
        "gated linear attention": delta(rule="sum"),
        "DeltaNet": delta(decay="none"),
        "gated DeltaNet": delta(),
        "Infini-attention": _mixer(InfiniAttention(attention=dataclasses.replace(FULL, mask=Chunk(size=4 * WINDOW)))),
        "TTT-Linear": _mixer(TTT(heads=HEADS, head_dim=DIM, chunk=WINDOW, shared=True, gate=True)),
        "TTT-MLP": _mixer(TTT(heads=HEADS, head_dim=DIM, chunk=WINDOW, depth=2, expand=2, rate=0.1, shared=True, gate=True)),
        "Titans LMM": _mixer(MEMORY),
        "Titans MAC": _mixer(_mac()),
        "Titans MAG": _mixer(TitansMAG(attention=HELD, memory=MEMORY)),
        "Titans MAL": _mixer(TitansMAL(attention=HELD, memory=MEMORY)),
    }


def _between() -> dict:
    """Memories between segments of two windows, which full attention reads; beacons for every four tokens of such windows."""
    size, full = 2 * WINDOW, _mixer(FULL)
    return {
        "RMT": (*full, ("model.memory", RMT(segment=size, slots=8))),
        "AutoCompressor": (*full, ("model.memory", AutoCompressor(segment=size, slots=4, most=64))),
        "HMT": (*full, ("model.memory", HMT(segment=size, sensory=8, size=DIM))),
        "Activation Beacon": (*full, ("model.memory", ActivationBeacon(window=size, ratio=4))),
    }


def _of_64_kb() -> dict:
    """Windows hold the newest keys and values of as many tokens; of what their caches hold beyond these nothing is read."""
    size, full = 2 * WINDOW, _mixer(FULL)
    delta = lambda **form: _mixer(GatedDeltaNet(heads=6, head_dim=DIM, value_dim=DIM, chunk=WINDOW, **form))
    memory = lambda **changes: dataclasses.replace(MEMORY, **changes)
    return {
        "window": _mixer(dataclasses.replace(FULL, mask=Window(size=64))),
        "linear attention": delta(rule="sum", decay="none"),
        "DeltaNet": delta(decay="none"),
        "gated DeltaNet": delta(),
        "Infini-attention": _mixer(InfiniAttention(attention=dataclasses.replace(FULL, mask=Chunk(size=WINDOW)))),
        "TTT-Linear": _mixer(TTT(heads=3, head_dim=DIM, chunk=WINDOW, shared=True, gate=True)),
        "Titans LMM": _mixer(memory(head_dim=16)),
        "Titans LMM, one matrix": _mixer(memory(depth=1, network="plain")),
        "Titans MAG": _mixer(TitansMAG(attention=HELD, memory=memory(heads=1, head_dim=20))),
        "RMT": (*full, ("model.memory", RMT(segment=size, slots=12))),
        "AutoCompressor": (*full, ("model.memory", AutoCompressor(segment=size, slots=4, most=16))),
        "HMT": (*full, ("model.memory", HMT(segment=size, sensory=8, size=DIM, bank=64))),
        "Activation Beacon": (*full, ("model.memory", ActivationBeacon(window=WINDOW, ratio=4, most=28))),
    }
