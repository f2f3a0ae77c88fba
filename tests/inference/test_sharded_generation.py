"""On a mesh prompts are answered as on one device, each device with its own rows and key heads."""

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Sink, Window
from lcx.channels.glu import GLU
from lcx.inference.generate import generate, prefill
from lcx.inference.serving import Serving
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.models.position_table import PositionTable
from lcx.parallel.mesh import MeshSpec
from lcx.positions.long_heads import LongHeads
from lcx.positions.rope import Rope
from lcx.spec import SpecError, edit
from lcx.support import validate_serving
from lcx.training.placement import parameter_shardings

MIXERS = (
    Attention(heads=4, kv_heads=2, head_dim=8),
    Attention(heads=4, kv_heads=2, head_dim=8, mask=Sink(size=1) | Window(size=4), sinks="learned"),
    GatedDeltaNet(heads=2, head_dim=8),
)
LAYERS = tuple(Layer(mixer=mixer, channel=GLU(hidden=32)) for mixer in MIXERS)
MODEL = Decoder(vocab=64, width=16, pattern=LAYERS, periods=2, embed_mixer=ShortConvolution(taps=2))
SERVING = Serving(model=MODEL, rows=8, length=32, chunk=4, mesh=MeshSpec(data=2, fsdp=2, tensor=2))


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


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("rows", 6, "rows = 6: expected a multiple of 4 (mesh.data 2 * mesh.fsdp 2)"),
        ("mesh", MeshSpec(context=2), "mesh.context = 2: expected 1, as the tokens of an answer come one at a time"),
        ("mesh", MeshSpec(tensor=4), "kv_heads = 2: expected a multiple of 4 (mesh.tensor 4)"),
        ("length", 1 << 25, "length = 33554432: expected at most 2^24 = 16777216, where positions are exact"),
        ("chunk", 32, "Serving.chunk = 32: expected less than length = 32, which is prompt and answer"),
        ("model.position_table", PositionTable(rows=16), "length = 32: expected at most the 16 places"),
        ("model.rope", Rope(rotary=0.1), "head_dim = 8 does not fit its rope"),
        ("model.pattern[0].mixer.distances", LongHeads(), "distances = LongHeads"),
    ],
)
def test_what_cannot_be_served_is_refused(field, value, said):
    with pytest.raises(SpecError) as refused:
        validate_serving(edit(SERVING, field, value))
    assert said in str(refused.value)
