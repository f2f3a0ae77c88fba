"""What bfloat16 does to RoPE: how much attention changes when all positions move by one number, which should be not at all.

    python -m lcx.evaluation.position_precision

`logits`: random queries and keys of 64 channels, 512 tokens; the mean change of a logit. float32; rotated in float32 and
rounded to bfloat16 after, as `rotate` does; with tables of cosines and sines rounded to bfloat16 first, as elsewhere.
`columns`: attention of the shipped `copier` on held-out source code, each layer's in bfloat16; the change of what a key
receives from all queries, a query, summed over keys, heads and layers (Wang et al. 2024); and which share of it is the first
token's. So small a model has no attention sink, which large ones have; below one is planted: the first key of every head is
what its queries have in common in the slower half of the channels, as long as a mean logit of 8 or 16 needs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.attention.mass import mass
from lcx.batch import Batch, TokenInfo, causal_info
from lcx.data.sources import StandardLibrary
from lcx.data.tokenizers import ByteTokenizer
from lcx.evaluation.raw_heads import raw_heads
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate, tables
from lcx.training.checkpoint import load_model
from lcx.training.run_folder import read_config
from lcx.training.shipped import run_folder

LENGTHS, SHIFTS, ROWS = (64, 128, 256, 512, 1024), (16, 1000, 100_000), 16
HEAD_DIM, SCALE = 64, 64**-0.5
SINKS = (0.0, 8.0, 16.0)  # mean logits of the first key


def rounded_tables(x: Float[Array, "B T H D"], positions: Float[Array, "B T P"]) -> Float[Array, "B T H D"]:
    """The rotation with everything in bfloat16."""
    cosine, sine = (t[:, :, None].astype(jnp.bfloat16) for t in tables(positions, Rope().frequencies(x.shape[-1], 0)))
    first, second = jnp.split(x.astype(jnp.bfloat16), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)


def rounded_after(x, positions):
    return rotate(x, positions, Rope().frequencies(x.shape[-1], 0)).astype(jnp.bfloat16)


def exact(x, positions):
    return rotate(x, positions, Rope().frequencies(x.shape[-1], 0))


def logits(turn, shift: int) -> float:
    """Mean change of a logit over causal pairs."""
    q, k = (jax.random.normal(jax.random.key(n), (1, 512, 1, HEAD_DIM)) for n in range(2))

    @functools.partial(jax.jit, static_argnums=0)
    def found(shift):
        places = (jnp.arange(512.0) + shift)[None, :, None]
        turned = (turn(x, places)[0, :, 0].astype(jnp.float32) for x in (q, k))
        return jnp.einsum("td,sd->ts", *turned, precision="highest") * SCALE

    return float(jnp.abs(found(shift) - found(0))[np.tril_indices(512)].mean())


def columns(model, tokens: np.ndarray, shift: int, sink: float = 0.0) -> tuple[float, float]:
    """(the summed change, the share of it that the first token has), mean over rows. sink: mean logit of one that is planted,
    0 is none."""
    info = causal_info(np.ones_like(tokens))
    length = tokens.shape[1]
    total, first = 0.0, 0.0
    for layer in range(model.spec.depth):
        moved, still = (_received(model, jnp.asarray(tokens), info, layer, n, sink) for n in (shift, 0))
        changed = moved - still
        each = jnp.abs(changed) / (length - jnp.arange(length))
        total, first = total + each.sum(), first + each[..., 0].sum()
    return float(total) / len(tokens), float(first / total)


def planted(q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], logit: float) -> Float[Array, "B T H D"]:
    """The keys with another first one, to which queries have this logit on average where nothing is turned."""
    pairs = q.shape[-1] // 2
    slow = jnp.arange(q.shape[-1]) % pairs >= pairs // 2
    common = jnp.where(slow, q.mean(axis=1), 0.0)
    squared = jnp.sum(common**2, axis=-1, keepdims=True)
    return k.at[:, 0].set(common / squared * logit * q.shape[-1] ** 0.5)


@functools.partial(jax.jit, static_argnames=("layer", "shift", "sink"))
def _received(model, tokens, info: TokenInfo, layer: int, shift: int, sink: float) -> Float[Array, "B K S"]:
    """Attention that each key of a layer receives from all queries, a query head a key head."""
    q, k = raw_heads(model, Batch(tokens=tokens, info=info), layer)
    k = planted(q, k, sink) if sink else k
    q, k = (rounded_after(part, info.positions + shift) for part in (q, k))
    options = {"mask": Causal(), "scale": q.shape[-1] ** -0.5}
    _, lse = attend(q, k, k, info, info, **options)
    return mass(q, k, lse, info, info, rows=jnp.arange(q.shape[1]), **options)


def main() -> None:
    print(f"| change of a logit | {' | '.join(f'shift {n:,}' for n in SHIFTS)} |\n| --- |" + " ---: |" * len(SHIFTS))
    names = {"float32": exact, "bfloat16 after a rotation in float32": rounded_after, "bfloat16 tables": rounded_tables}
    for name, turn in names.items():
        print(f"| {name} | {' | '.join(f'{logits(turn, shift):.1e}' for shift in SHIFTS)} |", flush=True)
    folder = run_folder("copier")
    model = load_model(folder, read_config(folder).model)
    text = Perplexity(source=StandardLibrary(split="heldout"), windows=ROWS)
    print("\n| tokens | sink | change of what keys receive | the first token's share |\n| ---: | ---: | ---: | ---: |")
    for sink in SINKS:
        for length in LENGTHS:
            tokens = np.asarray(text.inputs(ByteTokenizer(), length), np.int32)
            total, share = columns(model, tokens, 16, sink)
            print(f"| {length:,} | {sink:g} | {total:.4f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
