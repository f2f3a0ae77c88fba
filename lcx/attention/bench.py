"""Ring attention over eight forced CPU devices beside the `ringattention` package and plain attention; float32, causal.

    python -m lcx.attention.bench          times and memory, forward and backward, at 8,192 and 32,768 tokens
    python -m lcx.attention.bench packed   errors on packed rows whose segments are sharded like the queries

Forms take turns in one process; the figures are the shortest of the rounds, ratios are to the first row. Memory is what the
compiled program of one device takes for temporaries. What would need more than half of the memory that is free is not run.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lcx.attention.all_gather import AllGather
from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.attention.ring import Ring
from lcx.attention.sharded import sharded_attend
from lcx.attention.ulysses import Ulysses
from lcx.batch import TokenInfo, causal_info
from lcx.parallel.layout import Contiguous, Layout, Striped, Zigzag
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules

DEVICES, HEADS, HEAD_DIM, LENGTHS = 8, 8, 64, (8192, 32768)
ROUNDS = {8192: 4, 32768: 1}
CHUNK = 512  # of the peer's inner loops: its fastest of 256, 512 and 1,024 here


def ours(communication, layout: Layout) -> tuple[Callable, Layout]:
    def form(q, k, v, info):
        options = {"mask": Causal(), "scale": HEAD_DIM**-0.5}
        return sharded_attend(q, k, v, info, info, rules=Rules(), communication=communication, **options)[0]

    return form, layout


def theirs(q, k, v, info):
    spec = PartitionSpec(None, "context")
    chunks = {"causal_block_size": 1, "query_chunk_size": CHUNK, "key_chunk_size": CHUNK, "deterministic": True}
    chunks |= {"dropout_rng": None, "attn_pdrop": 0.0, "policy": jax.checkpoint_policies.nothing_saveable}
    chunks |= {"dtype": jnp.float32, "precision": None, "prevent_cse": True}

    def local(q, k, v, segments):
        return _peer().ringattention(q, k, v, None, segments, None, "context", True, chunks)

    run = jax.shard_map(local, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
    return run(q, k, v, info.segments)


def plain(q, k, v, info):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@functools.cache
def _peer():
    """The package, given the module of older JAX versions that it looks for."""
    jax.lib.xla_bridge = types.SimpleNamespace(get_backend=lambda: types.SimpleNamespace(platform="cpu"))
    import ringattention

    return ringattention


def rows(length: int, documents: int = 1) -> tuple[jax.Array, jax.Array, jax.Array, TokenInfo]:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, HEADS, HEAD_DIM)) for key in keys)
    return q, k, v, causal_info(np.arange(length)[None] * documents // length + 1)


def measure(forms: dict[str, tuple[Callable, Layout]], length: int) -> None:
    """Prints one row a form."""
    q, k, v, info = rows(length)
    runs, memory = {}, {}
    for name, (form, layout) in forms.items():
        places = layout.permutation(length, DEVICES)
        given = jax.tree.map(lambda x, places=places: x[:, places], (q, k, v, info))

        def both(q, k, v, info, form=form):
            out, pull = jax.vjp(lambda *a: form(*a, info), q, k, v)
            return pull(out)

        with contextlib.nullcontext() if form is plain else jax.set_mesh(MeshSpec(context=DEVICES).build()):
            compiled = jax.jit(both).lower(*given).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        if memory[name] * (1 if form is plain else DEVICES) < _free() / 2:
            runs[name] = functools.partial(compiled, *jax.device_put(given, compiled.input_shardings[0]))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS[length]):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[name] = min(best[name], time.perf_counter() - start)
    first = next(iter(best))
    for name in forms:
        cells = (f"{best[name]:.2f}", f"{best[name] / best[first]:.2f}") if name in best else ("not run", "")
        print(f"| {length} | {name} | {cells[0]} | {cells[1]} | {memory[name] / 2**20:.0f} |", flush=True)


def _free() -> float:
    """Bytes of memory that are free on this machine."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def packed(length: int = 4096, documents: int = 5) -> None:
    """Prints the largest error of each form on a packed row, over the largest output."""
    q, k, v, info = rows(length, documents)
    expected = attend(q, k, v, info, info, mask=Causal(), scale=HEAD_DIM**-0.5, backend="reference")[0]
    for name, (form, layout) in FORMS.items():
        places = layout.permutation(length, DEVICES)
        given = jax.tree.map(lambda x, places=places: x[:, places], (q, k, v, info))
        with jax.set_mesh(MeshSpec(context=DEVICES).build()):
            out = jax.device_get(jax.jit(form)(*given))
        error = jnp.abs(out - expected[:, places]).max() / jnp.abs(expected).max()
        print(f"| {name} | {error:.1e} |", flush=True)


FORMS = {
    "ring, zigzag": ours(Ring(), Zigzag()),
    "ring, striped by 128": ours(Ring(), Striped(granularity=128)),
    "ring, contiguous": ours(Ring(), Contiguous()),
    "all-gather, zigzag": ours(AllGather(), Zigzag()),
    "all-to-all": ours(Ulysses(), Contiguous()),
    "ringattention": (theirs, Contiguous()),
}


def main(arguments: list[str]) -> None:
    if arguments not in [[], ["packed"]]:
        sys.exit(__doc__)
    if importlib.util.find_spec("ringattention") is None:
        sys.exit("needs the ringattention package: use `make bench`")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(f"{DEVICES} forced devices on {os.cpu_count()} cores, jax {jax.__version__}\n")
    if arguments == ["packed"]:
        print("| form | largest error over largest output, packed row |\n|---|---|")
        return packed()
    print("| tokens | form | forward + backward s | ratio | temporaries a device MiB |\n|---|---|---|---|---|")
    for length in LENGTHS:
        measure(FORMS | {"jax.nn.dot_product_attention, one device": (plain, Contiguous())}, length)


if __name__ == "__main__":
    main(sys.argv[1:])
