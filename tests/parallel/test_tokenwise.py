"""A function of tokens in chunks equals the function itself in value and gradient, on one device and on meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from lcx.channels.channel import Channel
from lcx.channels.glu import GLU
from lcx.mixers.mixer import Inherited
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.parallel.tokenwise import tokenwise, weights_of
from lcx.parts import parts

SPREAD = Rules(batch=("data",), sequence=("fsdp", "context"), width=("fsdp", "context"))
MESHES = {
    "rows and sequence": (Rules(), MeshSpec(fsdp=2, context=4)),
    "sequence over two axes, width too": (SPREAD, MeshSpec(fsdp=2, context=2, tensor=2)),
    "width on axes of its own": (Rules(width=("tensor",), hidden=()), MeshSpec(data=2, tensor=2)),
}


def mix(channel, x, ids):
    return channel(x, ids)[0]


def built(spec, compute="float32", rules=Rules()):
    return spec.build(Inherited(width=16, depth=1, rope=None, compute=compute, rules=rules), rngs=nnx.Rngs(0))


def inputs(compute="float32"):
    x, slope = jax.random.normal(jax.random.key(0), (2, 4, 24, 16))
    return x.astype(compute), jnp.zeros((4, 24), jnp.int32), slope


def run(channel, x, ids, slope, *, chunk=None, rules=Rules()):
    """(output, gradients of the parameters, gradient of x) of the channel, in chunks if there is a size for them."""
    graph, state = nnx.split(channel)
    options = {"chunk": chunk, "rules": rules, "compute": x.dtype.name}

    def total(state, x):
        module = nnx.merge(graph, state)
        y = mix(module, x, ids) if chunk is None else tokenwise(mix, weights_of(module, mix, x, ids), x, ids, **options)
        return (y * slope).sum(), y

    (_, y), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(state, x)
    return y, *gradients


def error(found, wanted):
    """Largest over all arrays, in parts of each one's largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()) for a, b in pairs)


@functools.cache
def reference(spec):
    return jax.device_get(jax.jit(run)(built(spec), *inputs()))


@pytest.mark.parametrize("spec", [spec for cls in parts(Channel) for spec in cls.examples()], ids=str)
def test_every_channel_mixer_in_chunks_equals_it_whole(spec):
    found = jax.jit(functools.partial(run, chunk=5))(built(spec), *inputs())
    assert error(found, reference(spec)) < 2e-6


def test_the_gradient_of_a_gradient_through_layers():
    """As a model that trains itself takes it: 24 tokens, in chunks that they do not divide into."""
    x, ids, _ = inputs()
    layers = jax.tree.map(lambda p: jnp.stack([p, -p]), built(GLU(hidden=24)))

    def steepness(layers, chunk):
        def layer(x, channel):
            options = {"chunk": chunk, "rules": Rules(), "compute": "float32"}
            return x + tokenwise(mix, weights_of(channel, mix, x, ids), x, ids, **options), None

        slope = jax.grad(lambda x: jnp.sin(jax.lax.scan(layer, x, layers)[0]).sum())(x)
        return jnp.square(slope).sum()

    found, wanted = (jax.jit(jax.grad(functools.partial(steepness, chunk=chunk)))(layers) for chunk in (7, 24))
    assert error(found, wanted) < 1e-5


def test_bfloat16_is_as_close_to_float32_in_chunks_as_whole():
    spec = GLU(hidden=24, bias=True)
    of = lambda chunk: jax.jit(functools.partial(run, chunk=chunk))(built(spec, "bfloat16"), *inputs("bfloat16"))
    whole, chunked = of(None), of(5)
    np.testing.assert_array_equal(whole[0], chunked[0])
    assert error(chunked, reference(spec)) <= 1.1 * error(whole, reference(spec)) < 0.02


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if "own" in name else ()) for name in MESHES])
def test_a_mesh_gathers_weights_once_and_moves_no_tokens(name):
    rules, spec = MESHES[name]
    channel = GLU(hidden=32, bias=True)
    mesh = spec.build()
    with jax.set_mesh(mesh):
        place = lambda x, *logical: jax.device_put(x, NamedSharding(mesh, rules.partition(logical)))
        state = jax.tree.map(lambda leaf: leaf, nnx.state(built(channel, rules=rules)))
        x, ids, slope = inputs()
        rows = ("batch", "sequence")
        state = nnx.map_state(lambda _, leaf: leaf.replace(place(leaf[...], *leaf.get_metadata()["axes"])), state)
        module = nnx.merge(nnx.graphdef(built(channel, rules=rules)), state)
        given = module, place(x, *rows, None), place(ids, *rows), place(slope, *rows, None)
        compiled = jax.jit(functools.partial(run, chunk=2, rules=rules)).lower(*given).compile()
        assert error(compiled(*given), reference(channel)) < 5e-6
    loops = [text for text in re.split(r"\n(?=\S)", compiled.as_text()) if not text.startswith("ENTRY")]
    exchange = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\S*\(")
    own = {"all-reduce"} if spec.tensor > 1 else set()  # the compiler's sums of tensor parallelism
    assert {found[1] for text in loops for found in exchange.finditer(text)} <= own


def test_tokens_that_do_not_divide_over_the_devices_are_refused():
    x, ids, _ = inputs()
    channel = built(GLU(hidden=24))
    with (
        jax.set_mesh(MeshSpec(context=8).build()),
        pytest.raises(ValueError, match="4 rows of 23 do not divide over 1 x 8 devices"),
    ):
        tokenwise(mix, weights_of(channel, mix, x, ids), x[:, 1:], ids[:, 1:], chunk=2, rules=Rules(), compute="float32")
