"""Memory and sends of a feed-forward's gradient, whole and in chunks of tokens, on a TPU slice that is not there.

    python -m lcx.channels.bench v5e:4x4 4096 16384

One gated layer of 4,096 x 14,336 (Llama-3-8B) in bfloat16, sequence and weights over all devices, as many tokens a device as
given. Nothing is run: the TPU compiler says what the program holds and sends.
"""

import math
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from lcx.channels.glu import GLU
from lcx.mixers.mixer import Inherited
from lcx.parallel.hlo import collectives
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.parallel.tokenwise import tokenwise, weights_of
from lcx.parallel.topology import topology_devices

WIDTH, HIDDEN, CHUNK, COMPUTE = 4096, 14336, 1024, "bfloat16"
RULES = Rules(batch=("data",), sequence=("fsdp", "context"), width=("fsdp", "context"), vocab=())


def compiled(mesh: jax.sharding.Mesh, length: int, chunk: int | None) -> jax.stages.Compiled:
    """The gradient by weights and input of a row of `length` tokens."""
    inherited = Inherited(width=WIDTH, depth=1, rope=None, compute=COMPUTE, rules=RULES)
    graph, state = nnx.split(nnx.eval_shape(lambda: GLU(hidden=HIDDEN).build(inherited, rngs=nnx.Rngs(0))))

    def shape(sizes, dtype, *axes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, RULES.partition(axes)))

    def gradients(state, x, tokens, slope):
        mix = lambda channel, x, tokens: channel(x, tokens)[0]

        def output(state, x):
            channel = nnx.merge(graph, state)
            if chunk is None:
                return mix(channel, x, tokens)
            weights = weights_of(channel, mix, x, tokens)
            return tokenwise(mix, weights, x, tokens, chunk=chunk, rules=RULES, compute=COMPUTE)

        return jax.vjp(output, state, x)[1](slope)

    place = lambda _, leaf: leaf.replace(shape(leaf.shape, leaf.dtype, *leaf.get_metadata()["axes"]))
    state, x = nnx.map_state(place, state), shape((1, length, WIDTH), COMPUTE, "batch", "sequence", None)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, x))
    with jax.set_mesh(mesh):
        tokens = shape((1, length), jnp.int32, "batch", "sequence")
        return jax.jit(gradients, out_shardings=shardings).lower(state, x, tokens, x).compile()


def main(topology: str, *tokens: str) -> None:
    devices = topology_devices(topology)
    fsdp = math.isqrt(len(devices))
    mesh = MeshSpec(fsdp=fsdp, context=len(devices) // fsdp).build(devices)
    print("| tokens a device | chunk | temporaries GB | sends GB |\n| ---: | ---: | ---: | --- |")
    for count in map(int, tokens):
        for chunk in (None, CHUNK):
            program = compiled(mesh, count * mesh.size, chunk)
            temporary = program.memory_analysis().temp_size_in_bytes / 1e9
            sent = ", ".join(f"{kind} {found.bytes / 1e9:.2f}" for kind, found in collectives(program.as_text()).items())
            print(f"| {count:,} | {'whole' if chunk is None else f'{chunk:,}'} | {temporary:.2f} | {sent} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all(count.isdigit() for count in sys.argv[2:]):
        sys.exit(__doc__)
    main(*sys.argv[1:])
