"""LoRA begins as nothing, is what the merged model is, trains alone, and drops channels in training alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.channels.mlp import MLP
from lcx.lora import LoRA, with_dropout
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.rmt import RMT
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.models.decoder import Decoder, merged
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.spec import SpecError, edit, edits

ALL = LoRA(rank=2, projections=("query", "key", "value", "output", "up", "down"), scale=3.0)
LAYERS = tuple(
    Layer(mixer=Attention(heads=4, kv_heads=2, head_dim=4), channel=channel) for channel in (GLU(hidden=12), MLP(hidden=8))
)
SPEC = Decoder(vocab=20, width=8, pattern=LAYERS, periods=2, lora=ALL)
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 9))
BATCH = Batch(tokens=jnp.asarray(TOKENS, jnp.int32), info=causal_info(np.ones((2, 9), np.int32)))
RUN = jax.jit(lambda model, batch: model(batch)[0])


def built(spec=SPEC, drawn=True):
    """With `up` matrices that are not zero where `drawn`."""
    model = spec.build(rngs=nnx.Rngs(0))
    if drawn:
        state = nnx.state(model)
        flat = dict(nnx.to_flat_state(state))
        for n, path in enumerate(path for path in flat if path[-1] == "up" and "lora" in path):
            flat[path] = flat[path].replace(jax.random.normal(jax.random.key(n), flat[path].shape) / 3)
        nnx.update(model, nnx.from_flat_state(flat))
    return model


def test_it_begins_as_nothing():
    plain = edit(SPEC, "lora", None).build(rngs=nnx.Rngs(0))
    bare = merged(built(drawn=False))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(bare))) == jax.tree.map(
        jnp.shape, nnx.to_pure_dict(nnx.state(plain))
    )
    np.testing.assert_array_equal(RUN(built(drawn=False), BATCH), RUN(bare, BATCH))


@pytest.mark.parametrize("memory", [None, RMT(segment=4, slots=2)])
def test_merged_is_the_same_model(memory):
    model = built(edit(SPEC, "memory", memory))
    found = merged(model)
    assert found.spec.lora is None
    np.testing.assert_allclose(RUN(found, BATCH), RUN(model, BATCH), atol=1e-5)
    assert np.abs(RUN(model, BATCH) - RUN(merged(built(edit(SPEC, "memory", memory), drawn=False)), BATCH)).max() > 0.1


def test_it_lies_on_a_mesh():
    wanted, mesh = RUN(built(), BATCH), MeshSpec(fsdp=2, tensor=2).build()
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(lambda m, b: m(b)[0])(built(), BATCH), wanted, atol=1e-5)


def test_dropout_leaves_out_channels_anew_and_nothing_else():
    spec = edit(SPEC, "lora", dataclasses.replace(ALL, dropout=0.5))
    model, runs = built(spec), []
    for seed in range(200):
        runs.append(np.asarray(RUN(with_dropout(model, jax.random.key(seed)), BATCH)))
    assert len({run.tobytes() for run in runs}) == 200
    np.testing.assert_array_equal(RUN(model, BATCH), RUN(built(), BATCH))
    keys = with_dropout(model, jax.random.key(0)).slots[0].mixer.lora
    found = {tuple(key) for pair in keys.values() for key in np.asarray(pair.key).tolist()}
    assert len(found) == 2 * len(keys)  # of every layer and projection
    pair = with_dropout(model, jax.random.key(0)).slots[0].mixer.lora["query"]
    one = jax.tree.map(lambda leaf: leaf[0], pair)
    x = jnp.ones((2, 500, 8))
    mean = one(x).mean(axis=(0, 1))
    plain = jnp.tensordot(x[0, 0] @ one.down[...], one.up[...], axes=1) * ALL.scale / ALL.rank
    np.testing.assert_allclose(mean, plain, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([("pattern[0].mixer", GatedDeltaNet(heads=2, head_dim=4, value_dim=4))], r"pattern\[0\]\.mixer is no plain attention"),
        ([("memory", ActivationBeacon(window=4, ratio=2))], "no plain attention"),
        ([("lora", LoRA(rank=2, projections=("gate",)))], r"projections that pattern\[1\]\.channel has: up, down"),
        ([("lora", LoRA(rank=2, projections=("up",), dropout=0.1)), ("channel_chunk", 4)], "None beside lora.dropout"),
    ],
)
def test_what_is_refused(changes, line):
    with pytest.raises(SpecError, match=line):
        edits(SPEC, changes)


@pytest.mark.parametrize("options", [{"rank": 0}, {"projections": ()}, {"dropout": 1.0}, {"scale": 0.0}])
def test_fields(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        LoRA(**{"rank": 2} | options)
