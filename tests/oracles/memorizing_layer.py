"""Writes golden outputs of Memorizing Transformers' authors' memory and the two attentions that they mix, segment by segment.

    python tests/oracles/memorizing_layer.py CHECKOUTS    # writes tests/oracles/golden/memorizing_layer.npz

    meliad    google-research/meliad cc1aef50bdcda007e7ea15be9b9a89b95996d17a, transformer/attention.py,
              transformer/memory/{memory_layer,transformer_base}.py

`MemoryOnTpu` in `BatchedMemory`, `normalize_kq`, `simple_attention` and `external_attention` run as they are in float32; the
mix is a line of `TransformerLayer.__call__` written again. Segments of T tokens, N entries for each row and head, n of them
near:

    q, k      x / sqrt(sum(x ** 2) + 1e-6) of each head; scores times |scale|, scale [H] learned; no other scale, no positions
    memory    searched by all queries of a segment, then written with all its keys and values (no gradient), so that of a
              segment nothing is seen in it before the next, and the segments behind are seen both in it and in a cache, if
              there is one
    ring      entries are written one after another, the oldest over; N is a multiple of T and of n
    near      not the n best: entries whose number is b modulo n are compared among themselves, and one of each is taken
    out       (1 - g) local + g external, two softmaxes of the same queries, g = sigmoid(bias), bias [H] learned, 0 at first;
              local over the segment, causal
    empty     entries, zeros, are not chosen before others but not masked if chosen: score 0 and value 0 in the softmax of the
              external attention, which of an empty memory alone is 0
    reset     of a row: its entries are 0 and its next is number 0 again; done before the search of its first segment

    q, k, v [5,2,4,2,4] (segments, rows, T, H, D), not normalised, scale [2], bias [2], reset [5,2]      N = 12, n = 3
    out, local, external [5,2,4,2,4], near_keys, near_values [5,2,4,2,3,4]
    entries [5,2,2,12,2,4]                    after each segment: rows, heads, number, key and value

Of row 1 the third segment begins a document; row 0 writes over its oldest segment with its fourth.
Written with jax 0.10 and flax 0.12.
"""

import abc
import functools
import sys
import types
import typing
from pathlib import Path
from unittest import mock

import numpy as np
from authors import definitions

SEGMENTS, ROWS, LENGTH, HEADS, DIM, ENTRIES, NEAR = 5, 2, 4, 2, 4, 12, 3


def code(checkouts: Path):
    import jax
    import jax.numpy as jnp
    from flax import linen

    folder = checkouts / "meliad" / "transformer"
    given = {"jax": jax, "jnp": jnp, "lax": jax.lax, "np": np, "linen": linen, "nn": linen, "abc": abc, "functools": functools}
    given |= {
        "gin": types.SimpleNamespace(configurable=lambda part: part),
        "Shape": object,
        "Dtype": object,
        "Array": jax.Array,
    }
    given |= {name: getattr(typing, name) for name in ("Optional", "Tuple", "Any", "Sequence")}
    given |= {"vshape": lambda x: None, "logging": mock.Mock(), "__name__": __name__}
    names = "_target_dimensions", "_rearrange_dimensions_shapes", "_rearrange_dimensions", "_restore_dimensions"
    names += "_chunking_sparsify", "_retrieve_topk_gatherless", "MemoryLayer", "MemoryOnTpu", "BatchedMemory"
    memory = definitions(folder / "memory" / "memory_layer.py", *names, **given)
    position = definitions(folder / "position.py", "broadcast_mask", **given)
    names = "simple_attention", "external_attention"
    softmax = definitions(folder / "nn_components.py", "safe_softmax", **given)
    attention = definitions(folder / "attention.py", *names, position=position, nn_components=softmax, **given)
    normal = definitions(folder / "memory" / "transformer_base.py", "normalize_kq", **given).normalize_kq
    return memory, attention, normal


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    memory, attention, normal = code(checkouts)
    options = {"num_datasets": ROWS * HEADS, "key_features": DIM, "value_features": DIM}
    layer = memory.BatchedMemory(memory.MemoryOnTpu(database_size=ENTRIES, **options), split_dimensions=(0, -2))
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, SEGMENTS, ROWS, LENGTH, HEADS, DIM)).astype(np.float32)
    scale, bias = np.float32([3.0, -5.0]), np.float32([0.5, -1.0])
    reset = np.zeros((SEGMENTS, ROWS), bool)
    reset[0], reset[2, 1] = True, True
    given = {"q": q, "k": k, "v": v, "scale": scale, "bias": bias, "reset": reset}
    found = {name: [] for name in ("out", "local", "external", "near_keys", "near_values", "entries")}
    gate = jax.nn.sigmoid(bias)[:, None]
    causal = jnp.tril(jnp.ones((HEADS, LENGTH, LENGTH), bool))
    state = layer.init(jax.random.key(0), q[0], NEAR, method=layer.topk_retrieval)
    with jax.default_matmul_precision("highest"):
        for n in range(SEGMENTS):
            query, key = normal(q[n], jnp.float32), normal(k[n], jnp.float32)
            _, state = layer.apply(state, jnp.repeat(reset[n], HEADS), method=layer.reset, mutable=True)
            near, state = layer.apply(state, query, NEAR, method=layer.topk_retrieval, mutable=True)
            _, state = layer.apply(state, key, v[n], method=layer.update, mutable=True)
            local = attention.simple_attention(key, v[n], query, None, scale_factor=abs(scale), causal_mask=causal)
            external = attention.external_attention(*near, query, scale_factor=abs(scale))
            held = state["database"]["wrapped"]
            entries = jnp.stack([held["key_db"], held["value_db"]], -2).reshape(ROWS, HEADS, ENTRIES, 2, DIM)
            one = (1 - gate) * local + gate * external, local, external, *near, entries
            for name, value in zip(found, one, strict=True):
                found[name].append(value)
    return given | {name: np.asarray(jnp.stack(value)) for name, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "memorizing_layer.npz", **arrays(Path(sys.argv[1])))
