"""Attention of one layer over a whole TPU slice, as the TPU compiler has it: needs no TPU, but the `tpu` extra.

    python -m lcx.attention.bench_tpu          temporaries a chip beside the `ringattention` package, v5p:4x8x8
    python -m lcx.attention.bench_tpu bytes    bytes that a chip sends beside the planner's closed form, v5e:16x16

1,048,576 tokens (bytes: half of it), causal, bfloat16, heads of 128. The package (0.1.2) takes as many key heads as query heads
and has one axis of the sequence; it was written for an older Pallas, whose names and argument orders `_peer` gives it. It runs
with float32 logits: its running maxima and sums are then float32, as they always are here; without, today's Pallas refuses it.
"""

import functools
import importlib.util
import sys
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.attention.all_gather import AllGather
from lcx.attention.attend import local_fold
from lcx.attention.balance import Balance
from lcx.attention.communication import Communication
from lcx.attention.mask import Causal
from lcx.attention.planner import Work, estimates
from lcx.attention.ring import Ring, full_journeys
from lcx.attention.ulysses import RingUlysses
from lcx.parallel.hlo import collectives
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.topology import topology_devices
from pallas_kernels.tile_attention import op
from pallas_kernels.tile_attention.tokens import Tokens

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 1 << 20, 32, 8, 128
SENT = LENGTH // 2  # tokens of the table of bytes: gathered keys of more do not fit beside their gradients
CHUNKS = (128, 512)  # tokens of the package's tiles
ONE, TWO = ("context",), ("fsdp", "context")  # axes of the sequence


def wrapped(communication: Communication, axes: tuple[str, ...], q: jax.Array, k: jax.Array) -> op.Fold:
    return communication.wrap(local_fold(q, k, mask=Causal(), scale=HEAD_DIM**-0.5), axes)


def ours(axes: tuple[str, ...]) -> Callable:
    def form(q, k, v, tokens):
        return op.attention(wrapped(Ring(), axes, q, k), q, k, v, tokens, tokens)[0].astype(q.dtype)

    return form


def theirs(chunk: int) -> Callable:
    def form(q, k, v, tokens):
        chunks = {"causal_block_size": 1, "query_chunk_size": chunk, "key_chunk_size": chunk}
        return _peer()(q, k, v, None, None, None, *ONE, True, chunks)

    return form


@functools.cache
def _peer() -> Callable:
    """The package's kernel for TPUs."""
    jax.lib.xla_bridge = types.SimpleNamespace(get_backend=lambda: types.SimpleNamespace(platform="cpu"))
    from ringattention import ringattention_pallas_tpu as package

    def store(ref, at, value):
        ref[at] = value

    def call(kernel, *, compiler_params, **options):
        return pl.pallas_call(kernel, compiler_params=pltpu.CompilerParams(**compiler_params["mosaic"]), **options)

    older = {"BlockSpec": lambda index, shape: pl.BlockSpec(shape, index), "load": lambda ref, at: ref[at], "store": store}
    package.pl = types.SimpleNamespace(**(vars(pl) | older | {"pallas_call": call}))
    package.pltpu = types.SimpleNamespace(**(vars(pltpu) | {"repeat": lambda x, n, axis: jnp.concatenate([x] * n, axis)}))
    return package.ring_flash_attention_tpu


def compiled(
    local: Callable, mesh: Mesh, axes: tuple[str, ...], heads: int, kv_heads: int, more: tuple = (), length: int = LENGTH
):
    """`local(q, k, v, tokens, *more)` of every device's share; more: dtype and shape behind the tokens of further arrays."""
    spec = PartitionSpec(None, axes)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, length, *shape), dtype, sharding=NamedSharding(mesh, spec))
    tokens = Tokens(*(array(jnp.int32),) * 4)
    q, k = array(jnp.bfloat16, heads, HEAD_DIM), array(jnp.bfloat16, kv_heads, HEAD_DIM)
    given = (q, k, k, tokens, *(array(dtype, *shape) for dtype, shape in more))
    with jax.set_mesh(mesh):
        run = jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(run).lower(*given).compile()


def memory() -> None:
    """Prints MiB of temporaries a chip: of the forward pass, and of a program of both."""
    devices = topology_devices("v5p:4x8x8")
    line, grid = MeshSpec(context=256).build(devices), MeshSpec(fsdp=16, context=16).build(devices)
    forms = [("rings of 16 in a ring of 16", ours(TWO), grid, TWO, HEADS, KV_HEADS)]
    forms += [("ring of 256", ours(ONE), line, ONE, heads, KV_HEADS) for heads in (HEADS, KV_HEADS)]
    for heads in (HEADS, KV_HEADS):
        forms += [(f"ringattention, tiles of {chunk}", theirs(chunk), line, ONE, heads, heads) for chunk in CHUNKS]
    print("| form | query heads | key heads | forward MiB | forward and backward MiB |\n|---|---:|---:|---:|---:|")
    for name, form, mesh, axes, heads, kv_heads in forms:

        def both(q, k, v, tokens, d_out, form=form):
            out, pull = jax.vjp(lambda *x: form(*x, tokens), q, k, v)
            return out, pull(d_out)

        print(f"| {name} | {heads} | {kv_heads} |", end="", flush=True)
        for run, more in ((form, ()), (both, ((jnp.bfloat16, (heads, HEAD_DIM)),))):
            program = compiled(run, mesh, axes, heads, kv_heads, more)
            print(f" {program.memory_analysis().temp_size_in_bytes / 2**20:.1f} |", end="", flush=True)
        print()


def sent() -> None:
    """Prints MiB that a chip sends forward and backward, each compiled by itself, if every key is seen from every device."""
    mesh = MeshSpec(fsdp=16, context=16).build(topology_devices("v5e:16x16"))
    work = Work(rows=1, length=SENT, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, pairs=SENT * (SENT + 1) // 2)
    axes = {axis: mesh.shape[axis] for axis in TWO}
    moved = {one.name: one.moved for one in estimates(work, axes, Balance(1.0, 1.0), flops=1.0, link=1.0)}
    rows = (jnp.float32, (HEADS,))
    print("| strategy | closed form MiB | compiled MiB | by kind |\n|---|---:|---:|---|")
    for communication in (Ring(), RingUlysses(), AllGather()):

        def forward(q, k, v, tokens, communication=communication):
            return wrapped(communication, TWO, q, k).forward(q, k, v, tokens, tokens)

        def backward(q, k, v, tokens, lse, delta, d_out, communication=communication):
            found = wrapped(communication, TWO, q, k).backward(q, k, v, tokens, tokens, lse, delta, d_out)
            return tuple(x.astype(q.dtype) for x in found)

        name, total = type(communication).__name__, {}
        for run, more in ((forward, ()), (backward, (rows, rows, (jnp.float32, (HEADS, HEAD_DIM))))):
            text = compiled(run, mesh, TWO, HEADS, KV_HEADS, more, SENT).as_text()
            for kind, found in collectives(text, full_journeys(mesh.shape)).items():
                total[kind] = total.get(kind, 0) + found.bytes
        kinds = ", ".join(f"{kind} {size / 2**20:,.3f}" for kind, size in total.items())
        print(f"| {name} | {moved[name] / 2**20:,.3f} | {sum(total.values()) / 2**20:,.3f} | {kinds} |", flush=True)


def main(arguments: list[str]) -> None:
    if arguments not in [[], ["bytes"]]:
        sys.exit(__doc__)
    if arguments == ["bytes"]:
        return sent()
    if importlib.util.find_spec("ringattention") is None:
        sys.exit("needs the ringattention package: use `make bench`")
    memory()


if __name__ == "__main__":
    main(sys.argv[1:])
