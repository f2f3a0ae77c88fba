"""Decoding with every codec and some policies beside the dense cache, and what a token takes, on this machine's CPU, float32.

    python -m lcx.inference.bench_caches            all, in one run: medians and ratios as a Markdown table
    python -m lcx.inference.bench_caches int8 0     one cache, a line of JSON (what the above runs in fresh processes, in turn)
    python -m lcx.inference.bench_caches peaks      bytes of a prefill as XLA plans them, nothing is run

The model is `lcx.inference.bench`'s, 4 layers of width 256, 8 heads, 4 key heads of 32 channels; decoding is greedy, NEW tokens
at a time behind a prompt of LENGTH. Bytes are of the whole state, with the infos of tokens; the last column is what the codec's
arrays take of keys and values for heads of 128 channels, in bits a number. The peak of a prefill is the state, which
is written in place, and what a pass of CHUNK tokens needs beside it.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.cache.cache import Cache
from lcx.cache.codecs.codec import Codec, bits_of
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.scaled import Fp8, Int8
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.recency import Recency
from lcx.cache.scorers.snapkv import SnapKV
from lcx.inference.reading import feed, nothing_read
from lcx.models.decoder import Decoder
from lcx.side_by_side import in_turn, timed
from lcx.spec import edit

LENGTH, NEW, CHUNK = 16384, 32, 512


def caches() -> Mapping[str, Cache]:
    quant = {f"KVQuant-{bits}": KVCache(keys="raw", codec=KVQuant(codebook="uniform", bits=bits)) for bits in (4, 3, 2)}
    kept = {
        "newest 2,048": KVCache(policy=Evict(score=Recency(), keep=2048, sinks=4, heads="shared")),
        "SnapKV 12 %": KVCache(policy=Evict(score=SnapKV(), keep=0.12)),
        "SnapKV 20 %": KVCache(policy=Evict(score=SnapKV(), keep=0.2)),
        "SnapKV 20 %, int4": KVCache(codec=IntGroups(), policy=Evict(score=SnapKV(), keep=0.2)),
        "Chelsea 20 %": KVCache(policy=Chelsea(keep=0.2)),
    }
    whole = {"dense": DenseCache(), "slots": KVCache(), "int8": KVCache(codec=Int8()), "fp8": KVCache(codec=Fp8())}
    groups = {"int4": KVCache(codec=IntGroups()), "KIVI-4": KVCache(codec=KIVI(bits=4)), "KIVI-2": KVCache(codec=KIVI())}
    return whole | groups | quant | kept


def measure(name: str) -> dict:
    from lcx.inference.bench import SMALL, folder, prompt
    from lcx.inference.decoding import Asked, decode, keys_of, nothing_decoded, stop_rows
    from lcx.inference.reading import prefill
    from lcx.inference.sampling import Sampling, sampling_rows
    from lcx.interop.folder import Folder
    from lcx.interop.hf import read_decoder
    from lcx.spec import edits
    from lcx.training.checkpoint import load_model

    path, begin = folder(SMALL), time.perf_counter()
    spec = read_decoder(Folder(path))[0]
    spec = edits(spec, [("unroll", "all"), ("pattern[0].mixer.cache", caches()[name])])
    model = load_model(path, spec)
    read = jax.block_until_ready(prefill(model, [prompt(LENGTH)], 1, 8 * NEW, CHUNK))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(read.state))
    whole = jnp.full(1, NEW, jnp.int32)
    options = {"sampling": sampling_rows([Sampling()]), "stops": jnp.asarray(stop_rows([()]))}
    asked, kept = Asked(key=keys_of([0]), made=0 * whole, limit=1000 * whole, **options), [read]

    def once() -> float:
        made = decode(model, nothing_decoded(kept.pop(), NEW, jnp.zeros(1, bool)), asked, jnp.int32(NEW))
        kept.append(made.read)
        return float(made.logprobs.sum())

    return timed(once, begin, warm=1, steps=5) | {"bytes": held}


def prefill_bytes(spec: Decoder, length: int, chunk: int) -> tuple[int, int]:
    """(of the state of a row of `length` tokens, of what a pass of `chunk` tokens needs beside it) on this platform.

    Both as XLA plans them, but for arrays of the state that it does not write in place, which count to the second."""
    model = nnx.eval_shape(lambda: spec.build(rngs=nnx.Rngs(0)))
    whole, real = (jax.ShapeDtypeStruct((1,), kind) for kind in (jnp.int32, jnp.float32))
    tokens = jax.ShapeDtypeStruct((1, chunk), jnp.int32)
    read = jax.eval_shape(lambda model, *rest: nothing_read(model, 1, length, *rest), model, whole, real, whole)
    found = feed.lower(model, tokens, tokens, read).compile().memory_analysis()
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(read))
    return state, found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def bits(codec: Codec) -> float:
    """Bits a number of keys and values of heads of 128 channels, in whole blocks."""
    tables = codec.tables(0, 1, 128, 128)
    tables = jax.tree.map(lambda x: jnp.asarray(x)[None], tables)
    taken = [
        bits_of(jax.eval_shape(lambda c=c, t=t: c.encode(jnp.zeros((1, 1, 256, 128)), t)), 256 * 128)
        for c, t in zip((codec.keys, codec.values), tables, strict=True)
    ]
    return statistics.mean(taken)


def peaks() -> None:
    """A table of `prefill_bytes`."""
    from lcx.inference.bench import SMALL, folder
    from lcx.interop.folder import Folder
    from lcx.interop.hf import read_decoder

    spec = edit(read_decoder(Folder(folder(SMALL)))[0], "unroll", "all")
    print("| cache | state, MB | beside it, MB | peak, times the dense state |\n| --- | ---: | ---: | ---: |")
    dense, _ = prefill_bytes(edit(spec, "pattern[0].mixer.cache", DenseCache()), LENGTH, CHUNK)
    for name, cache in caches().items():
        state, beside = prefill_bytes(edit(spec, "pattern[0].mixer.cache", cache), LENGTH, CHUNK)
        print(f"| {name} | {state / 1e6:.1f} | {beside / 1e6:.1f} | {(state + beside) / dense:.2f} |", flush=True)


def main(argv: list[str]) -> None:
    if argv == ["peaks"]:
        peaks()
        return
    if argv:
        print(json.dumps(measure(argv[0])))
        return
    names = list(caches())
    runs = in_turn("lcx.inference.bench_caches", names, 0)
    seconds = {name: statistics.median(s for run in runs[name] for s in run["seconds"]) for name in names}
    lines = ["| cache | tokens/s | times the dense | MB | bits a number |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in names:
        cache, held = caches()[name], runs[name][0]["bytes"] / 1e6
        width = f"{bits(cache.codec):.2f}" if isinstance(cache, KVCache) and name != "slots" else "32"
        speed, ratio = NEW / seconds[name], seconds["dense"] / seconds[name]
        lines.append(f"| {name} | {speed:,.0f} | {ratio:.2f} | {held:.1f} | {width} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
