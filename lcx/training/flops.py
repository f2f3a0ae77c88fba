"""FLOPs of a training step, counted from the mask that is really used, and the peaks they are compared with.

Two conventions, always side by side. Masked: real (not padding) tokens and visible pairs. Full: every token and every pair of
the square T x T, as most reports count, which at long context overstates what was needed. A multiplication and an
addition are two operations; a backward pass is two forward passes; recomputation is not counted, nor what an objective does
beside a pass over its batch (autoencoding tells texts back in another).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Mapping

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from lcx.attention.count import document_pairs, visible_pairs
from lcx.attention.mask import Beyond, Causal, Chunk, ChunksBack, Mask, Window, Within
from lcx.batch import PADDING, TokenInfo
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.segment_memory import SegmentMemory
from lcx.memory.ttt_e2e import TTTE2E
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.mixers.infini_attention import InfiniAttention
from lcx.mixers.memorizing import MemorizingAttention
from lcx.mixers.mixer import Mixer
from lcx.mixers.neural_memory import NeuralMemory
from lcx.mixers.short_convolution import ShortConvolution
from lcx.mixers.titans import TitansMAG, TitansMAL
from lcx.mixers.titans_mac import TitansMAC
from lcx.mixers.transformer_xl import TransformerXL
from lcx.mixers.ttt import TTT
from lcx.models.decoder import Decoder
from lcx.training.optimizer import groups
from lcx.training.trainable import Path

# Dense bf16 peak of one JAX device, FLOP/s, by the start of its `device_kind` (data sheets). A tpu7x chip is two devices.
PEAKS: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
# Bytes/s of one device's memory, likewise.
BANDWIDTHS: Mapping[str, float] = {
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5e": 0.819e12,
    "TPU v5p": 2.765e12,
    "TPU v5": 2.765e12,
    "TPU v6 lite": 1.64e12,
    "TPU v6e": 1.64e12,
    "TPU7x": 7.37e12 / 2,
    "NVIDIA H100": 3.35e12,
    "NVIDIA H200": 4.8e12,
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch holds. pairs: visible pairs, all rows together, of each distinct mask of the model."""

    tokens: int
    pairs: Mapping[Mask, int]

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, {mask: self.pairs[mask] + other.pairs[mask] for mask in self.pairs})


@dataclasses.dataclass(frozen=True)
class Counter:
    """FLOPs of one model. per_token: of the forward pass; trained_per_token: of it, by matrices that are trained. per_pair: of
    the forward pass for one visible pair, by mask. detached: the part of them that no gradient goes through."""

    per_token: int
    per_pair: Mapping[Mask, int]
    trained_per_token: int
    detached: "Counter | None" = None

    def masked(self, info: TokenInfo) -> Work:
        """The real tokens and visible pairs of a batch (on the host)."""
        real = int((np.asarray(info.segments) != PADDING).sum())
        return Work(real, {mask: int(visible_pairs(mask, info, info).sum()) for mask in self.per_pair})

    def full(self, rows: int, length: int) -> Work:
        """All tokens and all pairs of rows of `length`."""
        return Work(rows * length, dict.fromkeys(self.per_pair, rows * length * length))

    def documents(self, rows: int, length: int) -> Work:
        """Rows of one causal document each: what a plan uses before data exist."""
        return Work(rows * length, {mask: rows * document_pairs(mask, length) for mask in self.per_pair})

    def forward(self, work: Work) -> int:
        """FLOPs of a forward pass."""
        return work.tokens * self.per_token + sum(pairs * self.per_pair[mask] for mask, pairs in work.pairs.items())

    def train(self, work: Work) -> int:
        """FLOPs of a forward and a backward pass. Frozen matrices have no gradient; one through all layers is counted."""
        without = 0 if self.detached is None else 2 * self.detached.forward(work)
        return 3 * self.forward(work) - work.tokens * (self.per_token - self.trained_per_token) - without


def counter(
    spec: Decoder,
    state: nnx.State,
    trained: Collection[Path] | None = None,
    ratios: Mapping[int, float] | None = None,
) -> Counter:
    """The counter of a decoder; `state` may be abstract. trained: paths of the parameters that are trained, None all. ratios:
    of beacons, with the share of windows that each is drawn for; None is the memory's own.

    Pairs that gists hide are counted. Raises TypeError for a mixer whose FLOPs are not known here.
    """
    flat, names = nnx.to_flat_state(state), flatten_dict(groups(state))
    matrices = {path: math.prod(leaf.shape) for path, leaf in flat if names[path] == "matrices"}
    if spec.head == "tied":
        matrices |= {path: spec.vocab * spec.width for path in names if path[0] == "embedding"}
    mixers = [(layer.mixer, spec.periods) for layer in spec.pattern]
    mixers += [(spec.embed_mixer, 1)] if spec.embed_mixer else []
    per_pair: dict[Mask, int] = {}
    for mixer, times in mixers:
        for mask, flops in pair_flops(mixer, spec.width).items():
            per_pair[mask] = per_pair.get(mask, 0) + times * flops
    learned = {path: size for path, size in matrices.items() if trained is None or path in trained}
    recurrent = sum(times * token_flops(mixer, spec.width) for mixer, times in mixers)
    if isinstance(spec.memory, ActivationBeacon):
        shares = ratios or {spec.memory.ratio: 1.0}
        per_token = [_with_beacons(spec.memory, held, shares) + recurrent for held in (matrices, learned)]
        return Counter(per_token[0], _pairs_with_beacons(spec.memory, per_pair, shares), per_token[1])
    if isinstance(spec.memory, TTTE2E):
        per_token = [2 * sum(held.values()) + recurrent for held in (matrices, learned)]
        return _with_steps(spec, Counter(per_token[0], per_pair, per_token[1]), matrices)
    if isinstance(spec.memory, SegmentMemory):
        per_token = [_by_segments(spec, held, recurrent) for held in (matrices, learned)]
        return Counter(per_token[0], _pairs_by_segments(spec, per_pair), per_token[1])
    per_token = [2 * sum(held.values()) + recurrent for held in (matrices, learned)]
    return Counter(per_token[0], per_pair, per_token[1])


def _by_segments(spec: Decoder, matrices: Mapping[Path, int], recurrent: int) -> int:
    """Of whole segments: layers read what stands around a segment and what asks for it as well, the head only its tokens; what
    a memory does with its few vectors is left out."""
    head = sum(count for path, count in matrices.items() if path[0] in ("head", "embedding"))
    layers = sum(count for path, count in matrices.items() if path[0] not in ("head", "embedding", "memory", "encoder"))
    more = 1 + (spec.memory.around + spec.memory.asks) / spec.memory.segment
    return round((2 * layers + recurrent) * more) + 2 * head


def _pairs_by_segments(spec: Decoder, per_pair: Mapping[Mask, int]) -> dict[Mask, int]:
    size, pairs = spec.memory.segment, lambda n: n * (n + 1) / 2
    more = (pairs(size + spec.memory.around) + pairs(spec.memory.asks)) / pairs(size)
    return {mask & Chunk(size=size): round(flops * more) for mask, flops in per_pair.items()}


def _with_steps(spec: Decoder, read: Counter, matrices: Mapping[Path, int]) -> Counter:
    """With a step for each chunk, the last of a document too: the head is applied, and a backward pass goes through it and the
    suffix, of whose matrices the fast ones alone have a gradient."""
    memory, times = spec.memory, spec.memory.suffix // len(spec.pattern)
    of = lambda *names: sum(count for path, count in matrices.items() if path[0] in names)
    suffix = of("slots") * times // spec.periods
    recurrent = sum(times * token_flops(layer.mixer, spec.width) for layer in spec.pattern)
    step = 2 * (2 * of("head", "embedding") + suffix + 2 * of("memory")) + 2 * recurrent
    pairs = dict.fromkeys(read.per_pair, 0)
    for layer in spec.pattern:
        for mask, flops in pair_flops(layer.mixer, spec.width).items():
            pairs[mask] += 2 * times * flops
    if memory.rate == 0:
        return read
    both = {mask: flops + pairs[mask] for mask, flops in read.per_pair.items()}
    detached = Counter(step, pairs, step) if memory.first_order else None
    return Counter(read.per_token + step, both, read.trained_per_token + step, detached)


def _with_beacons(memory: ActivationBeacon, matrices: Mapping[Path, int], shares: Mapping[int, float]) -> int:
    """A beacon for so many tokens goes through the layers, by its own projections where it has them; the head reads none."""
    layers = {path: count for path, count in matrices.items() if path[0] not in ("head", "embedding", "memory")}
    own = {path for path in layers if str(path[-1]).startswith("beacon_")}
    tokens = sum(count for path, count in matrices.items() if path not in own and path[0] != "memory")
    beacons = sum(count for path, count in layers.items() if path[-1] not in memory.own)
    return 2 * tokens + round(2 * beacons * sum(share / ratio for ratio, share in shares.items() if ratio))


def _pairs_with_beacons(memory: ActivationBeacon, per_pair: Mapping[Mask, int], shares: Mapping[int, float]) -> dict[Mask, int]:
    """Tokens and beacons of a window see half of its pairs, and beacons, or tokens that stay (ratio 0), of windows before."""
    size, flops, mean = memory.window, sum(per_pair.values()), lambda of: sum(share * of(r) for r, share in shares.items())
    more, kept = lambda ratio: 1 + (1 / ratio if ratio else 0), lambda ratio: 1 / max(ratio, 1)
    far = max(1, round(flops * mean(more) * mean(kept)))
    back = {ChunksBack(size=size): far, ChunksBack(size=size, farther=True): far}
    if memory.most is not None:  # of tokens that the newest beacons stand for
        back = {Beyond(size=size) & Within(size=size + round(memory.most / mean(kept))): far}
    return {Chunk(size=size): round(flops * mean(lambda ratio: more(ratio) ** 2)), **back}


@functools.singledispatch
def pair_flops(mixer: Mixer, width: int) -> dict[Mask, int]:
    """FLOPs for one visible (query, key) pair, by mask, beside those of the mixer's matrices; width: of the model."""
    raise TypeError(f"FLOPs of {type(mixer).__name__} are not known: register it with lcx.training.flops.pair_flops")


@pair_flops.register
def _(mixer: Attention, width: int) -> dict[Mask, int]:
    """Of chosen chunks: the pairs seen, on average over the places in a chunk; a product for each chunk before the query; and
    attention within chunks, both ways, for their sums."""
    if mixer.distances is not None and mixer.distances.reads_queries:
        size, most, product = mixer.distances.chunk, mixer.distances.chunks, 2 * mixer.heads * mixer.head_dim
        seen = Window(size=(most - 1) * size + (size + 1) // 2)
        return {seen: 2 * product, Causal(): max(1, product // size), Chunk(size=size): 4 * product}
    return {mixer.mask: 2 * mixer.heads * (query_halves(mixer) * mixer.head_dim + mixer.head_dim)}


@pair_flops.register
def _(mixer: ShortConvolution, width: int) -> dict[Mask, int]:
    return {}


@pair_flops.register
def _(mixer: GatedDeltaNet | NeuralMemory | TTT, width: int) -> dict[Mask, int]:
    return {}


@pair_flops.register
def _(mixer: TitansMAG | TitansMAL | InfiniAttention, width: int) -> dict[Mask, int]:
    return pair_flops(mixer.attention, width)


@pair_flops.register
def _(mixer: TitansMAC, width: int) -> dict[Mask, int]:
    """What is recalled asks and is asked beside each token."""
    (flops,) = pair_flops(mixer.attention, width).values()
    return {Chunk(size=mixer.memory.chunk): 4 * flops}


@pair_flops.register
def _(mixer: MemorizingAttention, width: int) -> dict[Mask, int]:
    """A product with each entry that may be there, and the values of those that are near with their softmax."""
    heads = mixer.attention.heads * mixer.attention.head_dim
    seen = Window(size=mixer.entries + mixer.segment)
    return {**pair_flops(mixer.attention, width), seen: pair_flops(mixer.attention, width).get(seen, 0) + 2 * heads}


@pair_flops.register
def _(mixer: TransformerXL, width: int) -> dict[Mask, int]:
    """Keys and queries have as many channels more as there are sinusoids, but where all distances are one."""
    (plain,) = pair_flops(mixer.attention, width).values()
    more = 2 * mixer.attention.heads * width if mixer.relative == "published" else 0
    return {mask: plain if clamped else plain + more for mask, clamped in mixer.seen}


def token_flops(mixer: Mixer, width: int) -> int:
    """FLOPs for one token beside those of matrices and pairs: of a recurrence as it is written, whatever chunks cost."""
    if isinstance(mixer, Attention):  # of persistent keys only those that are not one head's alone: matrices are counted once
        return 2 * (mixer.heads - mixer.kv_heads) * mixer.persistent * 2 * mixer.head_dim
    if isinstance(mixer, TransformerXL):
        return token_flops(mixer.attention, width)
    if isinstance(mixer, InfiniAttention):  # write and read, and the read of what the delta rule corrects
        products = 3 if mixer.rule == "delta" else 2
        own = products * 2 * mixer.attention.heads * mixer.attention.head_dim * (mixer.attention.head_dim + 1)
        return own + token_flops(mixer.attention, width)
    if isinstance(mixer, MemorizingAttention):
        return 2 * mixer.near * mixer.attention.heads * mixer.attention.head_dim + token_flops(mixer.attention, width)
    if isinstance(mixer, GatedDeltaNet):  # write and read, and the read of what the delta rule corrects
        products = 3 if mixer.rule == "delta" else 2
        return products * 2 * mixer.heads * mixer.head_dim * mixer.values
    if isinstance(mixer, NeuralMemory | TTT):  # matrices are its read; a write is a forward and a backward pass
        first, inner = _fast_matrices(mixer)
        return 2 * (3 * inner - first)
    if isinstance(mixer, TitansMAG | TitansMAL):
        return token_flops(mixer.attention, width) + token_flops(mixer.memory, width)
    if isinstance(mixer, TitansMAC):  # what is recalled goes through the attention, and to and from the memory
        a, m = mixer.attention, mixer.memory
        of_attention = width * a.head_dim * 2 * (a.heads + a.kv_heads) + 2 * a.kv_heads * a.persistent * a.head_dim
        of_memory = 2 * width * m.heads * m.head_dim + _fast_matrices(m)[1]
        return 2 * (of_attention + of_memory) + 2 * token_flops(a, width) + token_flops(m, width)
    return 0


def _fast_matrices(mixer: NeuralMemory | TTT) -> tuple[int, int]:
    """Elements of the first of a fast weight's matrices and of all of them, all heads together."""
    D, hidden = mixer.head_dim, mixer.expand * mixer.head_dim
    sizes = [i * o for i, o in itertools.pairwise([D, *[hidden] * (mixer.depth - 1), D])]
    return mixer.heads * sizes[0], mixer.heads * sum(sizes)


def query_halves(mixer: Attention) -> int:
    """How many times as wide as a value the products of scores are: 2 where a distance plan chooses dimensions."""
    return 2 if mixer.distances is not None and mixer.distances.chooses else 1


def peak(device_kind: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None for a device that is not in the table (a CPU)."""
    return _of_device(PEAKS, device_kind)


def bandwidth(device_kind: str) -> float | None:
    """Bytes/s of one device's memory; None for a device that is not in the table."""
    return _of_device(BANDWIDTHS, device_kind)


def _of_device(table: Mapping[str, float], device_kind: str) -> float | None:
    """The entry of the longest name that the kind begins with."""
    names = sorted((name for name in table if device_kind.startswith(name)), key=len)
    return table[names[-1]] if names else None
