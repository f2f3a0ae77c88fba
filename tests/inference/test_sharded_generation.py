"""On a mesh prompts are answered as on one device, each device with its own rows and key heads."""

import jax
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Hide, Sink, Window
from lcx.cache.dense import DenseCache
from lcx.channels.glu import GLU
from lcx.inference.generate import generate
from lcx.inference.reading import prefill
from lcx.inference.serving import Serving, answering
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.hmt import HMT
from lcx.memory.rmt import RMT
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.models.position_table import PositionTable
from lcx.parallel.mesh import MeshSpec
from lcx.positions.axial import AxialRope
from lcx.positions.clex import CLEX
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.long_heads import LongHeads
from lcx.positions.rope import Rope
from lcx.positions.self_extend import SelfExtend
from lcx.serving_plan import serving_compiled
from lcx.spec import SpecError, edits
from lcx.support import validate_serving
from lcx.training.placement import parameter_shardings

MIXERS = (
    Attention(heads=4, kv_heads=2, head_dim=8),
    Attention(heads=4, kv_heads=2, head_dim=8, mask=Sink(size=1) | Window(size=4), sinks="learned"),
    GatedDeltaNet(heads=2, head_dim=8),
)
LAYERS = tuple(Layer(mixer=mixer, channel=GLU(hidden=32)) for mixer in MIXERS)
MODEL = Decoder(vocab=64, width=16, pattern=LAYERS, periods=2, embed_mixer=ShortConvolution(taps=2))
SERVING = Serving(model=MODEL, rows=8, prompt=16, answer=16, chunk=4, mesh=MeshSpec(data=2, fsdp=2, tensor=2))


def shared_out(model, mesh):
    graph, state = nnx.split(model)
    placed = jax.device_put(nnx.to_pure_dict(state), parameter_shardings(state, model.spec.rules, mesh))
    nnx.replace_by_pure_dict(state, placed)
    return nnx.merge(graph, state)


def test_prompts_are_answered_on_a_mesh():
    validate_serving(SERVING)
    model = MODEL.build(rngs=nnx.Rngs(0))
    prompts = [[*range(1, n)] for n in (5, 9, 12, 3, 7, 7, 2, 4)]
    alone = generate(model, prompts, max_new=6, chunk=4)
    mesh = SERVING.mesh.build()
    with jax.set_mesh(mesh):
        model = shared_out(model, mesh)
        read = prefill(model, prompts, 8, 6, 4)
        found = generate(model, prompts, max_new=6, chunk=4)
    assert [row.ids for row in found] == [row.ids for row in alone]
    np.testing.assert_allclose(np.stack([row.logprobs for row in found]), [row.logprobs for row in alone], atol=1e-5)
    rows = (None, ("data", "fsdp"))
    assert tuple(read.state["layers"][0].k.sharding.spec) == (*rows, None, "tensor")
    assert all(tuple(leaf.sharding.spec)[:2] == rows for leaf in jax.tree.leaves(read.state["layers"]))


@pytest.mark.parametrize("mesh", [{"context": 4, "tensor": 2}, {"fsdp": 2, "context": 3}])
def test_slots_of_caches_are_shared_out(mesh):
    """Each device has its share of the keys of every row; what they find is one softmax."""
    spec = edits(MODEL, [("pattern", LAYERS[:2]), ("embed_mixer", None)])
    model, mesh = spec.build(rngs=nnx.Rngs(0)), MeshSpec(**mesh)
    prompts = [[*range(1, n)] for n in (5, 9, 12, 3, 7, 7, 2, 4)]
    alone = generate(model, prompts, max_new=6, chunk=4)
    validate_serving(edits(SERVING, [("model", answering(spec)), ("mesh", mesh)]))
    mesh = mesh.build()
    with jax.set_mesh(mesh):
        model = shared_out(rebuild(model, answering(spec)), mesh)
        read = prefill(model, prompts, 8, 6, 4)
        found = generate(model, prompts, max_new=6, chunk=4)
    assert [row.ids for row in found] == [row.ids for row in alone]
    np.testing.assert_allclose(np.stack([row.logprobs for row in found]), [row.logprobs for row in alone], atol=1e-5)
    assert read.state["layers"][0].k.sharding.spec[2] == "context"


def test_few_prompts_are_padded_to_the_devices_and_rows_stay_whole():
    model = MODEL.build(rngs=nnx.Rngs(0))
    (alone,) = generate(model, [[5, 6, 7]], max_new=4, chunk=4)
    with jax.set_mesh(MeshSpec(data=3).build()):
        (found,) = generate(model, [[5, 6, 7]], max_new=4, chunk=4)
    assert found.ids == alone.ids
    with jax.set_mesh(MeshSpec(context=2).build()), pytest.raises(ValueError, match="rows are shared out over context"):
        generate(model, [[5, 6, 7]], max_new=4)


def test_a_learned_rope_is_planned_solved(monkeypatch):
    """As `generate` uses it: the programs take its frequencies, not its equation. Shapes stand where types say arrays."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    raw = [(f"pattern[{n}].mixer.cache", DenseCache(keys="raw")) for n in range(2)]
    model = edits(MODEL, [("rope", CLEX(original_length=16, largest=2, steps=2)), *raw])
    serving = edits(SERVING, [("model", model), ("mesh", MeshSpec(data=2))])
    validate_serving(serving)
    found = serving_compiled(serving, jax.devices()[:2])
    assert found["answers, a token: temporary bytes a device"] > 0 and found["state bytes a device"] > 0


LAYER = "model.pattern[0].mixer"
BEACON = ActivationBeacon(window=16, ratio=4)


@pytest.mark.parametrize(
    "changes, said",
    [
        ([("rows", 2)], "rows = 2: expected a multiple of 4 (mesh.data 2 * mesh.fsdp 2)"),
        ([("rows", 6)], "Serving.rows = 6: expected a power of two, to which prompts are padded"),
        ([("mesh", MeshSpec(context=2))], "mesh.context = 2: expected 1, as the tokens of an answer come one at a time"),
        ([("mesh", MeshSpec(tensor=4))], "kv_heads = 2: expected a multiple of 4 (mesh.tensor 4)"),
        ([("prompt", 1 << 25)], "length = 33554448: expected at most 2^24 = 16777216, where positions are exact"),
        ([("answer", 0)], "Serving.answer = 0: expected at least 1"),
        ([("model.position_table", PositionTable(rows=16))], "positions up to 32: expected at most the 16 places"),
        ([("model.rope", Rope(rotary=0.1))], "head_dim = 8 does not fit its rope"),
        ([(f"{LAYER}.distances", LongHeads())], "distances = LongHeads"),
        (
            [("model.rope", AxialRope(sections=(2, 1, 1))), (f"{LAYER}.distances", SelfExtend(group=2, window=4))],
            "by AxialRope",
        ),
        ([("model.memory", BEACON)], "model.pattern[2].mixer: expected Attention beside model.memory, an ActivationBeacon"),
        ([("model.memory", HMT(segment=4, size=4, query="ahead"))], "model.memory.query = 'ahead': expected 'behind'"),
        ([("model.memory", RMT(segment=4, slots=2)), ("model.rope", DynamicNTK(original_length=8))], "that no length changes"),
        ([(f"{LAYER}.mask", Hide(query_role=1, key_role=0))], "hides roles, but no part of this config gives its tokens one"),
    ],
)
def test_what_cannot_be_served_is_refused(changes, said):
    with pytest.raises(SpecError) as refused:
        validate_serving(edits(SERVING, changes))
    assert said in str(refused.value)


def test_segments_need_a_table_of_their_own_length_alone():
    segments = [("model.memory", RMT(segment=4, slots=2)), ("model.position_table", PositionTable(rows=16))]
    validate_serving(edits(SERVING, segments))
