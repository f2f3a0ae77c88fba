"""Errors of the chunked head against float64, by tokens and dtype: a table of docs/numerics.md.

    python -m lcx.objectives.numerics

A head of 64 x 8,192, logits of standard deviation 2, targets drawn at random; chunks of 1,024 tokens, the vocabulary whole or
in parts. Errors: of the summed loss, relative; of the gradients of hidden states and head, the largest over the largest entry.
bfloat16 runs are compared with float64 of the same rounded hidden states and head.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.objectives.readout import readout

TOKENS = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
WIDTH, VOCAB, CHUNK = 64, 8192, 1024
PARTS = (1, 4)


def model_of(compute: str) -> nnx.Module:
    layer = Layer(mixer=Attention(heads=1, kv_heads=1, head_dim=8), channel=GLU(hidden=8))
    spec = Decoder(vocab=VOCAB, width=WIDTH, pattern=(layer,), periods=1, head="untied", compute=compute)
    return spec.build(rngs=nnx.Rngs(0))


def exact(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(summed loss, gradient of hidden, of head) in float64."""
    loss, d_hidden, d_head = 0.0, np.empty(hidden.shape), np.zeros(head.shape)
    for start in range(0, len(hidden), 4 * CHUNK):
        some = slice(start, start + 4 * CHUNK)
        logits = hidden[some] @ head
        peak = logits.max(axis=1, keepdims=True)
        p = np.exp(logits - peak)
        total = p.sum(axis=1, keepdims=True)
        place = np.arange(len(logits)), targets[some]
        loss += (peak + np.log(total)).sum() - logits[place].sum()
        p /= total
        p[place] -= 1
        d_hidden[some], d_head = p @ head.T, d_head + hidden[some].T @ p
    return loss, d_hidden, d_head


@functools.partial(jax.jit, static_argnums=(0, 5))
def measured(graph, state, head, hidden, targets, parts):
    def loss(head, hidden):
        model = nnx.merge(graph, state)
        model.head = nnx.Param(head, axes=("width", "vocab"))
        found = readout(model, hidden[None], targets[None], chunk=CHUNK, parts=parts)
        return (found.lse - found.target).sum()

    value, (d_head, d_hidden) = jax.value_and_grad(loss, (0, 1))(head, hidden)
    return value, d_hidden, d_head


def head_table() -> None:
    print("| tokens | dtype | parts of the vocabulary | loss | gradient of hidden | of head |\n|---|---|---|---|---|---|")
    for tokens in TOKENS:
        rng = np.random.default_rng(tokens)
        hidden, head = rng.normal(size=(tokens, WIDTH)), rng.normal(size=(WIDTH, VOCAB)) * 2 / WIDTH**0.5
        targets = rng.integers(0, VOCAB, tokens)
        for dtype in ("float32", "bfloat16"):
            given = [jnp.asarray(x, dtype) for x in (head, hidden)]
            wanted = exact(*(np.asarray(x, np.float64) for x in reversed(given)), targets)
            graph, state = nnx.split(model_of(dtype))
            for parts in PARTS:
                got = measured(graph, state, given[0].astype(jnp.float32), given[1], jnp.asarray(targets, jnp.int32), parts)
                got = [np.asarray(x, np.float64) for x in got]
                errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, wanted, strict=True)]
                print(f"| {tokens:,} | {dtype} | {parts} | {' | '.join(f'{error:.1e}' for error in errors)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    jax.config.update("jax_platforms", "cpu")
    head_table()
