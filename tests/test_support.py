"""Whole configs are refused with the field that is wrong, and what is not refused equals the unsharded float32 reference."""

import functools
import math
import random
import re

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.attention.all_gather import AllGather
from lcx.attention.mask import Window
from lcx.attention.ring import Ring
from lcx.attention.ulysses import RingUlysses, Ulysses
from lcx.batch import Batch, causal_info
from lcx.cache.codecs.groups import IntGroups
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.paged import PagedCache
from lcx.cache.policies.kvzip import KVzip
from lcx.cache.ring import RingCache
from lcx.cache.selectors.squeezed import Squeezed
from lcx.data.continuous import Continuous
from lcx.data.frames import Frames
from lcx.data.glossary import Glossary
from lcx.data.recall import Needles
from lcx.data.skipped import Skipped
from lcx.data.sources import TextFolder
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.gist import Gist
from lcx.memory.icae import ICAE
from lcx.memory.rmt import RMT
from lcx.memory.ttt_e2e import TTTE2E
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.mixers.short_convolution import ShortConvolution
from lcx.mixers.titans_mac import TitansMAC
from lcx.mixers.transformer_xl import TransformerXL
from lcx.mixers.ttt import TTT
from lcx.models.position_table import PositionTable
from lcx.objectives.autoencoding import Autoencoding
from lcx.objectives.beacon_modeling import BeaconModeling
from lcx.objectives.random_segments import RandomSegments
from lcx.parallel.layout import Contiguous, Zigzag
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.parts import parts
from lcx.positions.alibi import ALiBi
from lcx.positions.clex import CLEX
from lcx.positions.clex_positions import CLEXPositions
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import LengthRule
from lcx.positions.long_heads import LongHeads
from lcx.positions.longrope import LongRoPE
from lcx.positions.position_rule import DenseAndMoved, PoSE, RandomPositions, RandomSteps
from lcx.positions.query_scale import LogLength, LogN
from lcx.positions.rerope import ReRoPE
from lcx.positions.rope import Rope
from lcx.positions.visual import MRopePositions
from lcx.positions.xpos import XPos
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError, edit, edits
from lcx.support import RULES, broken, validate
from lcx.support_rules.walk import sequence_axes
from lcx.support_table import base, kinds, refusal
from pallas_kernels.tile_attention.tokens import Tokens

BEACON = ActivationBeacon(window=16, ratio=4)
LAYER = "model.pattern[0]"
FILMS = Frames(positions=MRopePositions())
GROWING = DynamicNTK(original_length=64, length_policy="growing")
GROUPED = PositionTable(rows=64, reading="grouped")
XL = TransformerXL(attention=Attention(heads=4, kv_heads=2, head_dim=8, rope="none"), segment=16, memory=16)
RECURRENT = [(f"{LAYER}.mixer", GatedDeltaNet(heads=2, head_dim=8)), ("data.mixture[0].rows", Continuous(rows_of=Needles()))]
TRAINED = [(f"{LAYER}.mixer.mask", Window(size=8)), ("model.memory", TTTE2E(chunk=16, suffix=1, hidden=32))]
ANOTHER = [
    ("model.rope", CLEX(original_length=64, largest=4)),
    ("data.positions", CLEXPositions(original_length=64, largest=4)),
    ("model.pattern", (base().model.pattern[0], base().model.pattern[0])),
]
KEPT = LongRoPE(short=(1.0,) * 4, long=(2.0,) * 4, factor=2.0, original_length=64, kept_positions=4)
RAW = (f"{LAYER}.mixer.cache", DenseCache(keys="raw"))
SKIPPING = LogN(original_length=64, skip_layers=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("mesh", MeshSpec(tensor=8))], "model.pattern[0].mixer.heads = 4: expected a multiple of 8 (mesh.tensor 8)"),
        (
            [("mesh", MeshSpec(tensor=4))],
            "model.pattern[0].mixer.kv_heads = 2: expected a multiple of 4 (mesh.tensor 4)",
        ),
        (
            [("mesh", MeshSpec(tensor=2)), (f"{LAYER}.channel.hidden", 33)],
            "model.pattern[0].channel.hidden = 33: expected a multiple of 2 (mesh.tensor 2)",
        ),
        ([("mesh", MeshSpec(fsdp=4)), ("model.width", 34)], "model.width = 34: expected a multiple of 4 (mesh.fsdp 4)"),
        (
            [("mesh", MeshSpec(fsdp=2, context=3)), ("model.rules.width", ("fsdp", "context")), ("data.length", 66)],
            "model.width = 32: expected a multiple of 6 (mesh.fsdp 2 * mesh.context 3)",
        ),
        (
            [(f"{LAYER}.mixer", TTT(heads=2, head_dim=8)), ("data.mixture[0].rows.most", None)],
            "model.documents = 4: expected at least the 64 documents that data.mixture[0].rows may put into a row: "
            "model.pattern[0].mixer, a TTT, has to hold them all; data.mixture[0].rows.most can limit them",
        ),
        (
            [("model.memory", RMT(segment=16, slots=2)), ("mesh", MeshSpec(context=2))],
            "mesh.context = 2: expected 1, as model.memory reads segments one after the other",
        ),
        (
            [("model.memory", RMT(segment=16, slots=2)), ("data.positions", RandomPositions(target=256))],
            "data.positions: expected positions that are the index, as those of model.memory begin anew",
        ),
        (
            [("model.memory", BEACON), (f"{LAYER}.mixer.mask", Window(size=8))],
            "model.pattern[0].mixer.mask: expected Causal() beside model.memory, an ActivationBeacon",
        ),
        (
            [("model.memory", BEACON), (f"{LAYER}.mixer", TTT(heads=2, head_dim=8))],
            "model.pattern[0].mixer: expected Attention beside model.memory, an ActivationBeacon, whose beacons are keys",
        ),
        (
            [("model.memory", BEACON), ("objective", BeaconModeling(ratios=(2, 8)))],
            "objective.ratios = (2, 8): expected those of model.memory, which has no [2, 8]",
        ),
        (
            [("model.memory", Gist(token=2)), ("data.mixture[0].rows", Glossary())],
            "model.memory.token = 2: expected 1, the gists of data.mixture[0].rows",
        ),
        (
            [("model.memory", Gist(token=1)), (f"{LAYER}.mixer", GatedDeltaNet(heads=2, head_dim=8))],
            "model.pattern[0].mixer: expected Attention beside model.memory, behind whose gists",
        ),
        (
            [("model.memory", Gist(token=1)), (f"{LAYER}.mixer.distances", LongHeads())],
            "model.pattern[0].mixer.distances: expected one that chooses by distance beside model.memory",
        ),
        ([("model.memory", Gist(token=300))], "model.memory.token = 300: expected a token below model.vocab = 264"),
        (
            [("model.memory", ICAE(segment=8, slots=2, most=4)), (f"{LAYER}.mixer", GatedDeltaNet(heads=2, head_dim=8))],
            "model.pattern[0].mixer: expected Attention beside model.memory.lora, which is added to its projections",
        ),
        (
            [(f"{LAYER}.mixer.distances", DimensionGroups(groups=(2, 8, 2), window=64))],
            "model.pattern[0].mixer.distances: DimensionGroups.groups = (2, 8, 2): expected as many as divide the 4",
        ),
        (
            [("data.positions", DenseAndMoved(densest=16, original_length=1 << 21))],
            "steps of 0.0625 at positions as large as 2097152, where those of float32 are 0.125",
        ),
        (
            [("data.positions", DenseAndMoved(densest=1, original_length=1 << 25))],
            "expected a target of at most 2^24 = 16777216",
        ),
        (
            [
                ("data.positions", DenseAndMoved(densest=1, original_length=10_000)),
                ("model.position_table", PositionTable(rows=128)),
            ],
            "data: positions up to 10000: expected at most the 128 places",
        ),
        (
            [*ANOTHER, (f"{LAYER}.mixer.rope", DynamicNTK(original_length=64))],
            "expected none of it, as the rope of model.pattern[0].mixer, DynamicNTK, has no row for the lengths it tells",
        ),
        (
            [("data.mixture[0].rows", Continuous(rows_of=Needles(), sees="own document")), ("model.rope", KEPT), RAW],
            "expected none of it, as the rope of model.pattern[0].mixer keeps the first 4 positions of a document",
        ),
        ([("objective", RandomSegments())], "model.memory: expected one between segments with `shortest` set"),
        (
            [("model.memory", RMT(segment=8, slots=2, shortest=4))],
            "model.memory.shortest = 4: expected None, as objective draws no lengths of segments",
        ),
        (
            [("model.memory", ActivationBeacon(window=64, ratio=4, ratios=(2,))), ("objective", BeaconModeling(ratios=(2, 4)))],
            "model.memory.window = 64: expected less than data.length = 64",
        ),
        ([("objective", Autoencoding())], "model.memory: expected one with an encoder, such as ICAE"),
        (
            [("model.memory", TTTE2E(chunk=16, suffix=1, hidden=32))],
            "model.pattern[0].mixer.mask = Causal(): expected a Window beside model.memory, a TTTE2E, which keeps",
        ),
        (
            [*TRAINED, ("model.memory.suffix", 2)],
            "model.memory.suffix = 2: expected a multiple of the pattern's 1 up to 1 layers",
        ),
        (
            [*TRAINED, (f"{LAYER}.mixer.backend", "xla")],
            "mixer.backend = 'xla': expected 'auto' or 'reference', as kernels have no",
        ),
        (
            [*TRAINED, ("model.rope", GROWING), (f"{LAYER}.mixer.cache.keys", "raw")],
            "model.pattern[0].mixer: expected a rope that no length changes beside model.memory, a TTTE2E",
        ),
        (
            [*TRAINED, ("mesh", MeshSpec(context=2))],
            "mesh.context = 2: expected 1, as model.memory learns chunks one after the other",
        ),
        ([("objective", BeaconModeling())], "model.memory: expected an ActivationBeacon, whose ratios objective draws"),
        (
            [("model.memory", edits(BEACON, [("ratio", 16)])), ("mesh", MeshSpec(context=8))],
            "model.memory: 4 beacons in data.length: expected a multiple of the 8 devices that share a row",
        ),
        ([("mesh", MeshSpec(tensor=2)), ("model.vocab", 263)], "model.vocab = 263: expected a multiple of 2 (mesh.tensor 2)"),
        ([("mesh", MeshSpec(context=3))], "data.length = 64: expected a multiple of 3 (mesh.context 3)"),
        ([("mesh", MeshSpec(data=2, fsdp=4))], "data.batch_size = 4: expected a multiple of 8 (mesh.data 2 * mesh.fsdp 4)"),
        ([("accumulation", 3)], "data.batch_size = 4: expected a multiple of 3 (accumulation 3)"),
        (
            [("mesh", MeshSpec(context=2)), ("model.rules.sequence", ())],
            "mesh.context = 2: expected 1, since model.rules give the axis nothing to shard",
        ),
        ([("model.vocab", 258)], "model.vocab = 258: expected at least the 259 ids of data.tokenizer"),
        ([("data.length", 2**24 + 1)], "data.length = 16777217: expected at most 2^24"),
        (
            [("data.length", 16), ("data.mixture[0].rows", Needles())],
            "data.mixture[0].rows does not fit data.length: Needles: length = 16: expected at least",
        ),
        (
            [("mesh", MeshSpec(tensor=2)), ("model.rules.heads", ())],
            "model.rules.kv_heads = ('tensor',): expected the axes of model.rules.heads, (), or none",
        ),
        (
            [
                ("mesh", MeshSpec(tensor=2)),
                ("model.rules.kv_heads", ()),
                (f"{LAYER}.mixer.heads", 12),
                (f"{LAYER}.mixer.kv_heads", 3),
            ],
            "mixer.kv_heads = 3: expected the 6 query heads of a device to be part of one key head's 4, or a multiple of them",
        ),
        (
            [("mesh", MeshSpec(context=2)), ("model.rules.hidden", ("context",))],
            "model.rules.hidden = ('context',): expected axes apart from those of batch and sequence (context)",
        ),
        (
            [(f"{LAYER}.mixer.rope", "none"), ("model.rope", YaRN(factor=8.0, original_length=128))],
            "no layer of this model reads it; set the rope of its mixers",
        ),
        (
            [("mesh", MeshSpec(context=4)), ("layout", Zigzag()), ("data.length", 60)],
            "data.length = 60: expected a multiple of 8 (mesh.context 4 * layout 2)",
        ),
        (
            [("mesh", MeshSpec(context=2)), ("layout", Zigzag()), ("model.embed_mixer", ShortConvolution())],
            "layout = Zigzag(): expected Contiguous(), as model.embed_mixer reads neighbours",
        ),
        (
            [("mesh", MeshSpec(context=8)), ("model.communication", Ulysses())],
            "model.communication = Ulysses(): it shares out 4 query heads over 8 devices: expected a multiple",
        ),
        (
            [("mesh", MeshSpec(context=2)), ("model.communication", RingUlysses())],
            "model.communication = RingUlysses(): it needs two axes of the sequence with more than one device each",
        ),
        (
            [("mesh", MeshSpec(tensor=2)), ("objective.parts", 5)],
            "model.vocab = 264: expected a multiple of 10 (mesh.tensor 2 * objective.parts 5)",
        ),
        (
            [("model.rope", DynamicNTK(original_length=64))],
            "model.pattern[0].mixer.cache.keys = 'rotated': expected 'raw', as its rope turns a key anew",
        ),
        (
            [(f"{LAYER}.mixer.distances", ReRoPE(window=8)), ("model.rope", Rope(sections=(2, 1, 1)))],
            "model.pattern[0].mixer.distances turns pairs by Rope: expected a rope of one axis that no length changes",
        ),
        (
            [(f"{LAYER}.mixer.distances", ReRoPE(window=8)), ("data.positions", PoSE(target=1024))],
            "expected None, as model.pattern[0].mixer.distances turns pairs by their index",
        ),
        (
            [("data.mixture[0].rows", Continuous(rows_of=Needles())), (f"{LAYER}.mixer.distances", ReRoPE(window=8))],
            "data.mixture[0].rows = Continuous: expected rows whose positions are their indices, by which model.pattern[0]",
        ),
        (
            [("data.positions", RandomPositions(target=512)), ("model.position_table", GROUPED)],
            "expected None or a rule that tells a length, which model.position_table reads",
        ),
        (
            [("data.mixture[0].rows", Continuous(rows_of=Needles())), ("model.position_table", GROUPED)],
            "data.mixture[0].rows = Continuous: expected rows whose positions are the index beside model.position_table",
        ),
        (
            [("data.positions", PoSE(target=512)), (f"{LAYER}.mixer.query_scale", LogLength(original_length=64))],
            "expected none of it, as model.pattern[0].mixer.query_scale, LogLength, goes by how long a document is",
        ),
        (
            [("trainable", ("layers/*",))],
            "Experiment.trainable: 'layers/*' matches no parameter: expected patterns of embedding",
        ),
        (
            RECURRENT,
            "data.mixture[0].rows.sees = 'anchor': expected another, as model.pattern[0].mixer, a GatedDeltaNet, begins each",
        ),
        (
            [("data.mixture[0].rows", FILMS)],
            "data.mixture[0].rows = Frames of 3 position axes: expected 1, which the rope of model.pattern[0].mixer turns by",
        ),
        (
            [("data.mixture[0].rows", FILMS), ("model.rope", None)],
            "data.mixture[0].rows = Frames: expected none of it, as no layer of this model has a rope, which reads positions",
        ),
        (
            [("data.positions", PoSE(target=1024)), ("model.rope", None)],
            "expected none of it, as no layer of this model has a rope, which reads positions",
        ),
        (
            [("data.positions", PoSE(target=1024)), ("model.rope", GROWING), (f"{LAYER}.mixer.cache.keys", "raw")],
            "as the rope of model.pattern[0].mixer, DynamicNTK, goes by how long a document is, which skipped positions",
        ),
        (
            [("data.positions", PoSE(target=1 << 20)), ("model.rope", XPos(scale_base=512))],
            "XPos.scale_base = 512: expected at least 16421 in rows of 1048576",
        ),
        (
            [
                ("data.mixture[0].rows", Skipped(rows_of=Needles(), target=2048)),
                ("model.position_table", PositionTable(rows=1024)),
            ],
            "data: positions up to 2048: expected at most the 1024 places that model.position_table reads",
        ),
        (
            [("data.positions", RandomSteps()), ("model.position_table", PositionTable(rows=1024))],
            "expected whole numbers beside model.position_table, which has a row for each",
        ),
        (
            [(f"{LAYER}.mixer.distances", DimensionGroups(groups=(1, 2, 4), window=8))],
            "DimensionGroups.groups = (1, 2, 4): expected as many as divide the 4 rotated pairs",
        ),
        (
            [(f"{LAYER}.mixer.distances", DimensionGroups(groups=(1, 2), window=8, dimensions="nowhere.npy"))],
            "DimensionGroups.dimensions = 'nowhere.npy': expected a .npy file of bool [layers, heads, pairs]",
        ),
        (
            [("mesh", MeshSpec(context=2)), ("model.communication", Ring()), (f"{LAYER}.mixer.distances", LongHeads())],
            "model.communication = Ring(): expected AllGather() or Ulysses(), as model.pattern[0].mixer.distances = LongHeads",
        ),
        (
            [("data.positions", CLEXPositions(original_length=64))],
            "model.rope = Rope: expected CLEX of original_length 64 and largest 16",
        ),
        (
            [("data.positions", CLEXPositions(original_length=1 << 20, largest=8)), ("data.length", 1 << 23)],
            "steps of 0.125 at positions as large as 16777216, where those of float32 are 1: expected a smaller reach",
        ),
        ([("data.positions", PoSE(target=8))], "expected a target of at least data.length"),
        (
            [(f"{LAYER}.mixer.query_scale", LogN(original_length=64, skip_layers=2)), ("model.periods", 2)],
            "model.pattern[0].mixer.query_scale.skip_layers = 2: expected at most 1, so that some of the 2 layers are",
        ),
        (
            [("model.embed_mixer", Attention(heads=4, kv_heads=4, head_dim=8, query_scale=SKIPPING))],
            "model.embed_mixer.query_scale.skip_layers = 1: expected 0 outside the layers of the pattern",
        ),
        (
            [("model.embed_mixer", XL), ("data.positions", PoSE(target=1024))],
            "expected positions that are the index, as model.embed_mixer, a TransformerXL, reads places by their index",
        ),
        (
            [
                (f"{LAYER}.mixer", edits(XL, [("relative", "rope"), ("attention.rope", "model")])),
                ("model.rope", DynamicNTK(original_length=64)),
            ],
            "model.pattern[0].mixer.attention.cache.keys = 'rotated': expected 'raw', as its rope turns a key anew",
        ),
        ([(f"{LAYER}.mixer.head_dim", 5)], "model.pattern[0].mixer.head_dim = 5 does not fit its rope: Rope.rotary"),
    ],
)
def test_each_rule_names_the_field_the_value_and_what_is_accepted(changes, message):
    experiment = edits(base(), changes)
    with pytest.raises(SpecError, match=re.escape(message)):
        validate(experiment)


def test_each_rule_is_broken_by_something_and_the_base_breaks_none():
    wrong = edits(
        base(),
        [
            ("mesh", MeshSpec(context=3, tensor=5)),
            ("model.rules.heads", ()),
            ("model.rules.kv_heads", ()),
            ("model.rules.hidden", ("context",)),
            ("model.rules.vocab", ()),
            ("model.rules.width", ("context",)),
            ("model.vocab", 7),
            ("objective.parts", 2),
            ("data.length", 2**24 + 3),
            ("data.batch_size", 3),
            ("accumulation", 2),
            (f"{LAYER}.mixer.head_dim", 5),
            (f"{LAYER}.mixer.mask", kinds()["mask"].variants["Hide"]),
        ],
    )
    short = edits(base(), [("data.length", 16), ("data.mixture[0].rows", Needles())])
    apart = edits(base(), [("mesh", MeshSpec(tensor=2)), ("model.rules.heads", ())])
    unread = edits(base(), [(f"{LAYER}.mixer.rope", "none"), ("model.rope", YaRN(factor=8.0, original_length=128))])
    order = edits(base(), [("mesh", MeshSpec(context=8)), ("layout", Zigzag()), ("model.embed_mixer", ShortConvolution())])
    order = edit(order, "model.communication", Ulysses())
    lengths = edits(base(), [("model.rope", GROWING), (f"{LAYER}.mixer.rope", DynamicNTK(original_length=64))])
    turned = edits(lengths, [(f"{LAYER}.mixer.distances", ReRoPE(window=8))])
    spread = edit(base(), "data.positions", CLEXPositions(original_length=64))
    fractions = edits(base(), [("data.positions", CLEXPositions(original_length=1 << 20)), ("data.length", 1 << 23)])
    small = edit(base(), "model.position_table", PositionTable(rows=8))
    twice = edits(spread, [("data.mixture[0].rows", Continuous(rows_of=base().data.mixture[0].rows))])
    chunks = edits(
        base(), [("mesh", MeshSpec(context=2)), ("model.communication", Ring()), (f"{LAYER}.mixer.distances", LongHeads())]
    )
    reaching = edits(base(), [("data.positions", PoSE(target=1024)), ("model.rope", GROWING)])
    unturned = edits(base(), [("data.positions", PoSE(target=1024)), ("model.rope", None)])
    skipping = edit(base(), f"{LAYER}.mixer.query_scale", SKIPPING)
    crowded = edits(base(), [(f"{LAYER}.mixer", TTT(heads=2, head_dim=8)), ("model.documents", 2)])
    segmented = edits(base(), [("model.memory", RMT(segment=16, slots=2)), ("mesh", MeshSpec(context=2))])
    drawing_lengths = edit(base(), "objective", RandomSegments())
    telling = edit(base(), "objective", Autoencoding())
    gists = edit(base(), "model.memory", Gist(token=300))
    learning = edits(base(), [*TRAINED, ("mesh", MeshSpec(context=2))])
    drawing = edit(base(), "objective", BeaconModeling())
    mac = edits(spread, [(f"{LAYER}.mixer", TitansMAC.examples()[0])])
    long_heads = (f"{LAYER}.mixer.distances", LongHeads(chunk=8, chunks=4))
    cached = [
        edits(base(), [(f"{LAYER}.mixer.cache", cache), *more])
        for cache, more in (
            (KVCache(), [long_heads]),
            (KVCache(), [("model.memory", RMT.examples()[0])]),
            (KVCache(keys="raw", positions="slots"), [(f"{LAYER}.mixer.distance_bias", ALiBi())]),
            (KVCache(codec=IntGroups(group=3)), []),
            (RingCache(), []),
            (PagedCache(page=16, pages=1), []),
            (KVCache(policy=KVzip(keep=0.5)), [(f"{LAYER}.mixer.sinks", "learned")]),
            (KVCache(selector=Squeezed()), [(f"{LAYER}.mixer.distance_bias", ALiBi())]),
        )
    ]
    configs = (
        skipping,
        drawing,
        gists,
        telling,
        drawing_lengths,
        learning,
        mac,
        crowded,
        segmented,
        edit(base(), "data.mixture[0].rows", FILMS),
        edits(base(), RECURRENT),
        edit(base(), "trainable", ("nothing",)),
        chunks,
        unturned,
        reaching,
        wrong,
        short,
        apart,
        unread,
        order,
        lengths,
        turned,
        spread,
        fractions,
        twice,
        small,
        *cached,
    )
    broken_by = lambda rule: [sentence for config in configs for sentence in rule(config)]
    assert [name for name, rule in RULES.items() if not broken_by(rule)] == []
    assert list(broken(base())) == []


def test_devices_are_counted_only_when_they_are_known():
    experiment = edit(base(), "mesh", MeshSpec(data=4))
    validate(experiment)
    validate(experiment, 4)
    with pytest.raises(SpecError, match="mesh = data 4 = 4 devices: expected at most the 3 there are"):
        validate(experiment, 3)


def test_a_backend_of_other_devices_is_refused_where_the_run_starts():
    experiment = edit(base(), f"{LAYER}.mixer.backend", "tpu")
    validate(experiment)
    with pytest.raises(SpecError, match=r"model.pattern\[0\].mixer.backend = 'tpu': expected 'auto', 'xla' or"):
        validate(experiment, 1)


def test_data_that_are_not_there_are_refused_before_the_run_starts():
    experiment = edit(base(), "data.mixture[0].rows.source", TextFolder(path="nowhere"))
    validate(experiment)
    with pytest.raises(SpecError, match=r"data.mixture\[0\].rows.source: TextFolder.path = 'nowhere': there is no such folder"):
        validate(experiment, 1)


def test_a_rule_of_parameters_catches_what_no_field_names():
    """A part whose parameter shape follows from no field of a known name is still refused before devices are needed."""
    experiment = edits(base(), [("mesh", MeshSpec(fsdp=2)), ("model.rules.layers", ("fsdp",)), ("model.rules.width", ())])
    with pytest.raises(SpecError, match="does not divide over mesh"):
        validate(experiment)


def test_the_table_knows_every_part():
    for kind in ("mask", "mixer", "packing"):
        assert kinds()[kind].variants.keys() >= {cls.__name__ for cls in parts(_base_of(kind)) if cls.examples()}
    assert kinds()["rope"].variants.keys() == {cls.__name__ for cls in parts(FrequencyRule)} | {"none"}


def _base_of(kind):
    return next(iter(kinds()[kind].variants.values())).__class__.__mro__[1]


def test_a_choice_without_a_field_is_no_combination():
    with pytest.raises(LookupError):
        refusal(("mixer", "ShortConvolution"), ("mask", "Window"))


def packed_batch(rows, length, vocab, seed):
    """Several documents a row, padding on both sides."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, vocab, (rows, length + 1), dtype=np.int32)
    cuts = np.sort(draw.integers(1, length - 1, (rows, 3)), axis=1)
    segments = (np.arange(length) >= cuts[..., None]).sum(axis=1) + 1
    segments[0, :5] = 0
    segments[-1, -7:] = 0
    weights = (draw.random((rows, length)) < 0.8) * (segments != 0)
    info = jax.tree.map(np.asarray, causal_info(segments))
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_weights=weights.astype(np.float32), info=info)


@functools.cache
def parameters():
    """Of the base model with every part of the table that has some."""
    changes = [("model.embed_mixer", ShortConvolution()), (f"{LAYER}.mixer.sinks", "learned")]
    spec = edits(base(), [*changes, ("model.rope", CLEX.examples()[0])]).model
    return nnx.to_pure_dict(nnx.state(spec.build(rngs=nnx.Rngs(0))))


def held(params, like):
    """The parameters that stand in the tree `like`."""
    return {k: held(v, like[k]) if isinstance(v, dict) else v for k, v in params.items() if k in like}


def totals(experiment, batch):
    """(sums, gradient over its largest entry) of the experiment on its mesh."""
    step = experiment.training_step(experiment.mesh.build())
    params = jax.device_put(held(parameters(), step.shardings.params), step.shardings.params)
    batch = experiment.layout.lay(batch, math.prod(sequence_axes(experiment).values()))
    with jax.set_mesh(step.mesh):
        gradient, sums = jax.jit(step.totals)(params, batch, jax.random.key(0))
    return jax.device_get((sums, gradient))


def _sees(mask):
    """Whether some token of a causal document sees another."""
    place = np.arange(64, dtype=np.int32)
    tokens = Tokens(index=place, order=place, segments=place * 0 + 1, roles=place * 0)
    return (np.asarray(mask.visible(tokens.rows(), tokens.columns())) & ~np.eye(64, dtype=bool)).any()


COMBINED = [pytest.param(seed, marks=pytest.mark.slow if seed >= 2 else ()) for seed in range(30)]


@pytest.mark.parametrize("seed", COMBINED)
def test_what_is_not_refused_equals_the_dense_reference(seed):
    draw = random.Random(seed)
    choices = {name: draw.choice(list(kind.variants)) for name, kind in kinds().items() if name != "mesh axis"}  # two, below
    choices["mixer"], choices["memory"] = "Attention", "no memory"  # compared elsewhere
    choices["backend"] = draw.choice(["auto", "reference", "xla"])
    if not _sees(kinds()["mask"].variants[choices["mask"]]):
        choices["mask"] = draw.choice([name for name, mask in kinds()["mask"].variants.items() if _sees(mask)])
    shared = ["context"] if seed % 3 < 2 else []  # in two of three, rows are
    sizes = dict.fromkeys([*shared, *draw.sample(["data", "fsdp", "tensor"], 2 - len(shared))], 2)
    rules = Rules()
    if choices["communication"] == "RingUlysses":
        sizes, rules = {"fsdp": 2, "context": 2}, Rules(batch=("data",), sequence=("fsdp", "context"))
    if isinstance(kinds()["rope"].variants[choices["rope"]], LengthRule):
        choices["cache"] = "raw keys"
    pair = lambda other: refusal((other, choices[other]), ("distances", choices["distances"]))
    if pair("rope") is not None or pair("mask") is not None:
        choices["distances"] = "plain"
    if choices["distances"] != "plain":
        choices["bias"] = "no bias"
    if pair("cache") is not None:
        choices["cache"] = "raw keys"
    if choices["mask"] == "Hide":
        assert "hides roles" in refusal(*choices.items())
        return
    assert refusal(*choices.items()) is None
    changes = [(kinds()[name].field, kinds()[name].variants[choice]) for name, choice in choices.items()]
    changes += [("model.rules", rules), ("mesh", MeshSpec(**sizes))]
    if choices["layout"] == "Contiguous":
        changes += [("model.embed_mixer", ShortConvolution())]
    experiment = edits(base(), changes)
    validate(experiment, jax.device_count())
    batch = packed_batch(4, 64, 259, seed)
    alone = [("mesh", MeshSpec()), ("layout", Contiguous()), ("model.communication", AllGather())]
    whole = [("model.remat", "none"), ("model.channel_chunk", None), ("objective.parts", 1)]
    reference = edits(experiment, [(f"{LAYER}.mixer.backend", "reference"), *alone, *whole])
    (sums, gradient), (wanted, wanted_gradient) = totals(experiment, batch), totals(reference, batch)
    for name, value in wanted.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=f"{choices} {sizes} {name}")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted_gradient))

    def close(path, found, leaf):
        noise = 1 if path[0].key == "rope" else 0.02  # where a window of one token leaves nothing; times 64 positions
        allowed = 1e-5 * max(np.abs(leaf).max(), noise * largest)
        assert np.abs(found - leaf).max() <= allowed, (choices, sizes, path)

    jax.tree_util.tree_map_with_path(close, gradient, wanted_gradient)
