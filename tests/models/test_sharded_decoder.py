"""A sharded decoder equals the unsharded one in hidden states, loss gradient and logits, on every pairing of axes."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Sink, Window
from lcx.attention.ring import Ring
from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import REMAT, Decoder
from lcx.models.layer import Layer
from lcx.parallel.hlo import group_size, operand_bytes, parse
from lcx.parallel.mesh import AXES, MeshSpec
from lcx.parallel.rules import Rules
from lcx.spec import edits

MESHES = [MeshSpec(**{a: 2, b: 4 if b == "context" else 2}) for a, b in itertools.combinations(AXES, 2)]
SPREAD = Rules(batch=("data",), sequence=("fsdp", "context"), width=("fsdp", "context"), vocab=())  # as pods have it
MEMORY = {  # what the decoder does about memory on some of the meshes; on the others nothing
    MeshSpec(data=2, context=4): [("channel_chunk", 3), ("remat", "attention")],
    MeshSpec(fsdp=2, context=4): [("channel_chunk", 1), ("remat", "offload"), ("rules", SPREAD)],
    MeshSpec(fsdp=2, tensor=2): [("channel_chunk", 5), ("remat", "full")],
}


PAIR = ("fsdp", "tensor")
RULES = {
    "keys on every device": (Rules(kv_heads=()), MeshSpec(tensor=4)),
    "keys on every device, two of them a device": (Rules(kv_heads=()), MeshSpec(tensor=2)),
    "vocabulary over two axes": (Rules(batch=("data",), width=(), vocab=("fsdp", "tensor")), MeshSpec(fsdp=2, tensor=2)),
    "heads over two axes": (
        Rules(batch=("data",), width=(), heads=("fsdp", "tensor"), kv_heads=()),
        MeshSpec(fsdp=2, tensor=2),
    ),
    "sequence over two axes": (Rules(batch=("fsdp",), sequence=("context", "data")), MeshSpec(data=2, context=2)),
}


def decoder(rules: Rules = Rules(), heads: int = 4) -> Decoder:
    window = Sink(size=1) | Window(size=4)
    layers = (
        Layer(mixer=Attention(heads=heads, kv_heads=2, head_dim=8), channel=GLU(hidden=32)),
        Layer(
            mixer=Attention(heads=heads // 2, kv_heads=2, head_dim=8, mask=window, sinks="learned"),
            channel=GLU(hidden=16),
        ),
    )
    return Decoder(vocab=64, width=16, pattern=layers, periods=2, embed_mixer=ShortConvolution(taps=2), rules=rules)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    segments = np.asarray([[1] * 9 + [2] * 7, [1] * 16, [0] * 3 + [1] * 13, [1] * 2 + [2] * 3 + [3] * 8 + [0] * 3])
    return Batch(tokens=jnp.asarray(rng.integers(0, 64, (4, 16)), jnp.int32), info=causal_info(segments))


def program(model, batch):
    """The compiled gradient, and what it takes."""

    def scalar(state, graph):
        hidden, _, _ = nnx.merge(graph, state)(batch)
        logits = nnx.merge(graph, state).logits(hidden)
        return jnp.where(batch.info.segments[..., None] > 0, jnp.sin(logits), 0).sum(), logits

    graph, state = nnx.split(model)
    return jax.jit(jax.value_and_grad(scalar, has_aux=True), static_argnums=1).lower(state, graph).compile(), state


def outputs(model, batch):
    return results(*program(model, batch))


def results(compiled, state):
    (value, logits), gradient = compiled(state)
    return value, logits, nnx.to_pure_dict(gradient)


@pytest.fixture(scope="module")
def unsharded():
    return outputs(decoder().build(rngs=nnx.Rngs(0)), batch())


def some(cases, suite):
    """The cases, those outside the suite marked slow: a training step is taken on pairs of axes in test_step."""
    return [pytest.param(case, marks=() if case in suite else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    "spec", some(MESHES, [*MEMORY][1:2]), ids=lambda spec: "-".join(a for a in AXES if getattr(spec, a) > 1)
)
def test_sharded_equals_unsharded(spec, unsharded):
    """Where weights lie on two axes, those of a layer are gathered one axis at a time, and no gradient is summed as a whole."""
    model = edits(decoder(), MEMORY.get(spec, []))
    with jax.set_mesh(spec.build()):
        compiled, state = program(model.build(rngs=nnx.Rngs(0)), batch())
        close(results(compiled, state), unsharded)
    if model.rules == SPREAD:
        smallest = 4 * 16 * 2 * 8  # bytes of a matrix
        groups = exchanges(compiled.as_text(), least=smallest // 8)
        assert groups["all-gather"] == groups["reduce-scatter"] == {2, 4}
        assert not exchanges(compiled.as_text(), least=smallest)["all-reduce"]


def exchanges(text, least):
    """By kind, of how many devices collectives in the layers are that take at least so many bytes."""
    found, given = collections.defaultdict(set), parse(text)
    for instructions in given.computations.values():
        for instruction in instructions:
            size = group_size(instruction, given.devices)
            if "while" in instruction.op_name and size > 1 and operand_bytes(instruction, instructions) >= least:
                found[instruction.opcode.removesuffix("-start")].add(size)
    return found


def ring(remat: str, **options) -> Decoder:
    layer = Layer(mixer=Attention(heads=2, kv_heads=2, head_dim=8), channel=GLU(hidden=16))
    options = {"remat": remat, "communication": Ring()} | options
    return Decoder(vocab=64, width=16, pattern=(layer,), periods=2, **options)


def test_a_kept_result_of_attention_spares_the_backward_pass_a_ring():
    def sends(remat):
        graph, state = nnx.split(nnx.eval_shape(lambda: ring(remat).build(rngs=nnx.Rngs(0))))
        loss = lambda state: nnx.merge(graph, state)(batch())[0].sum()
        return str(jax.make_jaxpr(jax.grad(loss))(state)).count("ppermute")

    with jax.set_mesh(MeshSpec(context=4).build()):
        kept = sends("none")
        forward = sends("full") - kept
        assert sends("attention") == kept > forward > 0


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT)
def test_a_ring_of_eight_devices_under_every_policy(remat):
    wanted = outputs(ring("none").build(rngs=nnx.Rngs(0)), batch())
    with jax.set_mesh(MeshSpec(context=8).build()):
        close(outputs(ring(remat, channel_chunk=1).build(rngs=nnx.Rngs(0)), batch()), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_other_rules(name):
    rules, spec = RULES[name]
    with jax.set_mesh(spec.build()):
        sharded = outputs(decoder(rules, heads=8).build(rngs=nnx.Rngs(0)), batch())
    close(sharded, unsharded_with_eight_heads())


@functools.cache
def unsharded_with_eight_heads():
    return outputs(decoder(heads=8).build(rngs=nnx.Rngs(0)), batch())


def close(sharded, unsharded):
    real = np.asarray(batch().info.segments > 0)
    np.testing.assert_allclose(sharded[1][real], unsharded[1][real], atol=1e-5)
    for got, wanted in zip(jax.tree.leaves(sharded[2]), jax.tree.leaves(unsharded[2]), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * max(1.0, np.abs(wanted).max()))
