"""FLOPs against the matrix products of the traced program, and against pairs counted by hand."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval

from lcx.attention.count import document_pairs
from lcx.attention.mask import Causal, Chunk, ChunksBack, Sink, Window
from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.rmt import RMT
from lcx.memory.ttt_e2e import TTTE2E
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.mixers.mixer import Mixer
from lcx.mixers.neural_memory import NeuralMemory
from lcx.mixers.titans_mac import TitansMAC
from lcx.mixers.transformer_xl import TransformerXL
from lcx.mixers.ttt import TTT
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.models.position_table import PositionTable
from lcx.objectives.beacon_modeling import BeaconModeling
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.long_heads import LongHeads
from lcx.spec import edit, edits
from lcx.training.flops import PEAKS, counter, pair_flops, peak, token_flops
from lcx.training.step import abstract_model
from lcx.training.trainable import trained_paths


def layer(mask, heads=4):
    mixer = Attention(heads=heads, kv_heads=2, head_dim=4, mask=mask, backend="reference")
    return Layer(mixer=mixer, channel=GLU(hidden=16))


MODEL = Decoder(vocab=32, width=8, pattern=(layer(Causal()), layer(Window(size=3), heads=2)), periods=3)


def products(jaxpr) -> int:
    """Operations of every dot_general of a jaxpr, two for a multiplication and an addition; loop bodies count each time."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left.shape[axis] for axis in contracted]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        total += times * sum(products(value) for value in inner if hasattr(value, "eqns"))
    return total


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_full_count_is_every_matrix_product_of_the_forward_pass(head):
    spec = edit(MODEL, "head", head)
    graph, state = abstract_model(spec)
    segments = jnp.ones((2, 24), jnp.int32)
    batch = Batch(tokens=segments, info=causal_info(segments))

    def forward(state):
        model = nnx.merge(graph, state)
        return model.logits(model(batch)[0])

    count = counter(spec, state)
    assert count.forward(count.full(2, 24)) == products(jax.make_jaxpr(forward)(state).jaxpr)
    assert count.train(count.full(2, 24)) == 3 * count.forward(count.full(2, 24))


def test_masked_count_is_of_real_tokens_and_visible_pairs():
    """Documents of 5 and 4 tokens and 3 of padding: causal 15 + 10 pairs; window of 3: 1 + 2 + 3 + 3 + 3 and 1 + 2 + 3 + 3."""
    count = counter(MODEL, abstract_model(MODEL)[1])
    info = causal_info(np.asarray([[0] * 2 + [1] * 5 + [2] * 4 + [0]], np.int32))
    work = count.masked(info)
    assert work.tokens == 9
    assert dict(work.pairs) == {Causal(): 25, Window(size=3): 21}
    matrices = 6 * 3 * 8 * 16 + 3 * 8 * 4 * (4 + 2 + 2 + 4) + 3 * 8 * 4 * (2 + 2 + 2 + 2) + 32 * 8
    scores = 3 * (25 * 4 + 21 * 2) * 4 * 2
    assert count.forward(work) == 2 * (9 * matrices + scores)


def test_a_choice_of_dimensions_doubles_the_scores_alone(tmp_path):
    """A pair of 2 heads of 4 channels: 2 x 2 x (4 + 4) FLOPs, and of queries in two halves 2 x 2 x (8 + 4)."""
    groups, chosen = DimensionGroups(groups=(1, 2), window=4), str(tmp_path / "chosen.npy")
    np.save(chosen, np.ones((3, 2, 2), bool))
    for plan, flops in ((None, 32), (groups, 32), (edit(groups, "dimensions", chosen), 48)):
        spec = edit(MODEL, "pattern", (edit(layer(Causal(), heads=2), "mixer.distances", plan),))
        count = counter(spec, abstract_model(spec)[1])
        assert dict(count.per_pair) == {Causal(): 3 * flops}
        assert count.forward(count.documents(1, 5)) == 5 * count.per_token + 15 * 3 * flops


def test_documents_are_counted_before_data_exist():
    count = counter(MODEL, abstract_model(MODEL)[1])
    info = causal_info(np.ones((3, 10), np.int32))
    assert count.documents(3, 10) == count.masked(info)


def test_layers_of_one_mask_are_counted_together():
    spec = edit(MODEL, "pattern", (layer(Causal()), layer(Causal()), layer(Sink(size=1))))
    assert dict(counter(spec, abstract_model(spec)[1]).per_pair) == {Causal(): 2 * 3 * 4 * 16, Sink(size=1): 3 * 4 * 16}


def test_every_mixer_has_a_count():
    """A mixer without one would make the reported utilisation wrong."""

    def kinds(kind):
        for sub in kind.__subclasses__():
            yield sub
            yield from kinds(sub)

    for kind in kinds(Mixer):
        for mixer in kind.examples():
            assert all(flops > 0 for flops in pair_flops(mixer, 8).values())


def test_chosen_chunks():
    """4 heads of 8: of a pair seen 4 x 32, of a chunk before a query 2 x 32, within a chunk 8 x 32 a pair before it."""
    mixer = Attention(heads=4, kv_heads=2, head_dim=8, distances=LongHeads(chunk=4, chunks=3))
    assert pair_flops(mixer, 8) == {Window(size=10): 128, Causal(): 16, Chunk(size=4): 256}


def test_frozen_matrices_have_no_gradient_and_a_table_of_positions_no_product():
    state = abstract_model(MODEL)[1]
    whole = counter(MODEL, state)
    some = counter(MODEL, state, trained_paths(state, ("slots/*/mixer/*",)))
    work = whole.full(2, 24)
    frozen = some.per_token - some.trained_per_token
    assert 0 < frozen < some.per_token and whole.train(work) - some.train(work) == 2 * 24 * frozen
    tabled = edit(MODEL, "position_table", PositionTable(rows=64))
    assert counter(tabled, abstract_model(tabled)[1]).per_token == whole.per_token


def test_a_recurrence_is_counted_as_it_is_written():
    """2 heads of 4 by 8: a write, a read, and with the delta rule another, of 2 x 2 x 4 x 8."""
    rules = [GatedDeltaNet(heads=2, head_dim=4, rule=rule) for rule in ("delta", "sum")]
    assert [token_flops(mixer, 8) for mixer in rules] == [3 * 128, 2 * 128]


def test_memories_that_are_trained():
    """2 heads of 4 by 16 by 4: matrices are the read; a write goes forward, and backward but for the keys. In MAC all of the
    attention's matrices read what is recalled too, of 8 x 4 x 6 and 2 persistent keys; the memory is asked once more."""
    memory = NeuralMemory(heads=2, head_dim=4, chunk=4)
    assert token_flops(memory, 8) == token_flops(TTT(heads=2, head_dim=4, depth=2), 8) == 2 * (3 * 2 * 128 - 2 * 64)
    attention = Attention(heads=2, kv_heads=1, head_dim=4, persistent=2)
    assert token_flops(attention, 8) == 2 * 2 * 2 * 4
    mac = TitansMAC(attention=attention, memory=memory)
    recalled = 2 * (8 * 4 * 6 + 2 * 2 * 4 + 2 * 8 * 8 + 256)
    assert token_flops(mac, 8) == recalled + 2 * 32 + token_flops(memory, 8)
    assert pair_flops(mac, 8) == {Chunk(size=4): 4 * 4 * 2 * 4}


def test_scores_by_distance_are_of_wider_heads():
    """4 heads of 8, width 16: of a pair 2 x 4 x (8 + 8), and 2 x 4 x 16 where distances are told apart; the pairs of 11 tokens
    in segments of 4 with 3 before: 26 within segments; 12 and 9 in the second and third."""
    attention = Attention(heads=4, kv_heads=2, head_dim=8, rope="none")
    spec = TransformerXL(attention=attention, segment=4, memory=3, clamp=4)
    (near, told), (far, clamped) = pair_flops(spec, 16).items()
    assert (told, clamped) == (256, 128) and token_flops(spec, 16) == 0
    assert document_pairs(near, 11) + document_pairs(far, 11) == 26 + 12 + 9
    assert document_pairs(far, 11) == 6 + 3  # of four and more tokens back: 1 + 2 + 3, 1 + 2
    assert set(pair_flops(edits(spec, [("clamp", None), ("relative", "rope")]), 16).values()) == {128}


def test_reading_by_segments():
    """Segments of 4 with 2 vectors on each side: 8 positions for 4 tokens, 36 pairs for 10; the head reads the tokens."""
    plain = counter(MODEL, abstract_model(MODEL)[1])
    spec = edit(MODEL, "memory", RMT(segment=4, slots=2))
    found = counter(spec, abstract_model(spec)[1])
    assert found.per_token == found.trained_per_token == 2 * plain.per_token - 2 * MODEL.vocab * MODEL.width
    state = abstract_model(spec)[1]
    assert counter(spec, state, trained_paths(state, ("memory/*",))).trained_per_token == 0
    assert found.per_pair == {mask & Chunk(size=4): round(3.6 * flops) for mask, flops in plain.per_pair.items()}


def test_reading_with_beacons():
    """A beacon for 2 tokens of windows of 4: three halves of the layers' products, with their own queries and values; pairs of
    windows of 6, and of 6 and 2 before; what is trained of a beacon is half of its projections."""
    beacon = ActivationBeacon(window=4, ratio=2, own=("query", "value"))
    spec = edits(MODEL, [("pattern", MODEL.pattern[:1]), ("memory", beacon)])
    state = abstract_model(spec)[1]
    plain, found = counter(edit(spec, "memory", None), abstract_model(edit(spec, "memory", None))[1]), counter(spec, state)
    head = 2 * MODEL.vocab * MODEL.width
    assert found.per_token == (3 * plain.per_token - head) // 2
    assert counter(spec, state, trained_paths(state, ("*beacon_*",))).trained_per_token == 3 * (8 * 16 + 8 * 8)
    shares = BeaconModeling(ratios=(1, 2, 0), weights=(1.0, 2.0, 1.0)).drawn_ratios
    assert shares == {1: 0.25, 2: 0.5, 0: 0.25}
    drawn = counter(spec, state, ratios=shares)
    assert drawn.per_token - counter(spec, state).per_token == 0  # 1/4 of ratio 1 and 1/2 of ratio 2 make half a beacon a token
    flops = sum(plain.per_pair.values())
    near, far = 0.25 * 4 + 0.5 * 2.25 + 0.25, 1.5 * (0.25 + 0.5 * 0.5 + 0.25)
    assert drawn.per_pair[Chunk(size=4)] == round(near * flops)
    assert drawn.per_pair[ChunksBack(size=4)] == round(far * flops)
    (flops,) = plain.per_pair.values()
    far = 3 * flops // 4
    assert found.per_pair == {Chunk(size=4): 9 * flops // 4, ChunksBack(size=4): far, ChunksBack(size=4, farther=True): far}


def test_a_decoder_that_trains_itself():
    """A chunk of 4 that is learned: the products of the traced program, where attention makes its scores anew to go back."""
    memory = TTTE2E(chunk=4, suffix=2, hidden=5)
    spec = edits(MODEL, [("pattern", MODEL.pattern[1:]), ("memory", memory)])
    graph, state = abstract_model(spec)
    found = counter(spec, state)
    head, prime, layer = 32 * 8, 3 * 8 * 5, 8 * 4 * 8 + 3 * 8 * 16
    step = 2 * (2 * head + 2 * layer + 2 * 2 * prime)
    assert found.per_token == found.trained_per_token == 2 * (head + 3 * layer + 2 * prime) + step
    assert found.per_pair == {Window(size=3): (3 + 2 * 2) * 32}

    def learned(state, tokens):
        model = nnx.merge(graph, state)
        given = model.init_state(2, 4)
        part = given.opened._replace(tokens=tokens)
        return model._learned(given.fast, part, given.caches, after=tokens[:, 0], rows=tokens[:, 0] > 0)[:2]

    jaxpr = jax.make_jaxpr(learned)(state, jnp.ones((2, 4), jnp.int32)).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    pairs = 2 * 4 * (3 - 1 + 4)
    assert products(jaxpr) == 2 * 4 * (2 * (2 * layer + 2 * prime) + step) + 2 * pairs * (32 + 5 * 16)

    first = edit(spec, "memory.first_order", True)
    work, plain = found.full(2, 24), counter(first, state)
    inner = 2 * 24 * step + 2 * 24 * 24 * 4 * 32
    assert found.train(work) == 3 * found.forward(work) and plain.forward(work) == found.forward(work)
    assert plain.train(work) == found.train(work) - 2 * inner
    still = counter(edit(spec, "memory.rate", 0.0), state)
    assert found.forward(work) - still.forward(work) == inner
    assert counter(spec, state, trained_paths(state, ("memory/*",))).trained_per_token == 2 * 2 * prime + step


def test_unknown_mixers_and_devices_are_not_guessed():
    with pytest.raises(TypeError, match="FLOPs of Mock are not known"):
        pair_flops(mock.Mock(spec=Mixer), 8)
    assert peak("cpu") is None


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
    ],
)
def test_peaks_of_device_kinds(kind, flops):
    assert peak(kind) == flops
    assert any(kind.startswith(name) for name in PEAKS)
