"""Transformer-XL's attention over a memory, and two layers over three segments, as the authors' code gives them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformer_xl import DIM, HEAD_DIM, HEADS, MEMORY, ROWS, SEGMENT

from lcx.attention.mask import tokens_of
from lcx.batch import Batch, causal_info
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited
from lcx.mixers.transformer_xl import TransformerXL
from lcx.parallel.rules import Rules
from pallas_kernels.tile_attention.tokens import Tokens

with np.load(Path(__file__).parent / "golden" / "transformer_xl.npz") as held:
    GIVEN = {key: jnp.asarray(held[key]) for key in held}
CASES = {"plain": {}, "clamp": {"clamp": 3}, "same": {"same_length": True}}


def rows_first(x):
    return jnp.moveaxis(x, 0, 1)


def weights_of(prefix):
    return {name.removeprefix(prefix): value for name, value in GIVEN.items() if name.startswith(prefix)}


def module_of(weights, **options):
    attention = Attention(heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, rope="none", backend="reference")
    inherited = Inherited(width=DIM, depth=1, rope=None, compute="float32", rules=Rules())
    module = TransformerXL(attention=attention, memory=MEMORY, **options).build(inherited, rngs=nnx.Rngs(0))
    by_head = lambda matrix: matrix.T.reshape(DIM, HEADS, HEAD_DIM)
    for name, matrix in zip(("query", "key", "value"), jnp.split(weights["qkv_net.weight"], 3), strict=True):
        getattr(module, name)[...] = by_head(matrix)
    module.position[...] = by_head(weights["r_net.weight"])
    module.output[...] = weights["o_net.weight"].T.reshape(HEADS, HEAD_DIM, DIM)
    module.content_bias[...], module.position_bias[...] = GIVEN["u"], GIVEN["v"]
    return module


def norm(weights, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights["layer_norm.weight"] + weights["layer_norm.bias"]


def batch_of(length, start=0):
    ones = jnp.ones((ROWS, length), jnp.int32)
    return Batch(tokens=ones, info=causal_info(ones, start=jnp.full(ROWS, start)))


@pytest.mark.parametrize("case", ["post", "pre"])
def test_attention_over_a_memory(case):
    """The memory is a segment of its own in front, and gets no gradient."""
    weights, given = weights_of("weights/attention/"), weights_of(f"attention/{case}/")
    module = module_of(weights, segment=MEMORY)
    row = jnp.concatenate([rows_first(given["memory"]), rows_first(given["x"])], axis=1)
    mix = lambda x: module(x, batch_of(x.shape[1]))[0]

    @jax.jit
    def run(row):
        y = row + mix(norm(weights, row)) if case == "pre" else norm(weights, row + mix(row))
        return (y[:, MEMORY:] * rows_first(given["cotangent"])).sum(), y[:, MEMORY:]

    slope, out = jax.grad(run, has_aux=True)(row)
    np.testing.assert_allclose(out, rows_first(given["out"]), atol=5e-6)
    np.testing.assert_allclose(slope[:, MEMORY:], rows_first(given["dx"]), atol=5e-6)
    assert not slope[:, :MEMORY].any()


@jax.jit
def layer(module, attention, channel, x, start=0, state=None):
    """Post-norm, of the mixer and the authors' channels."""
    y, state, _ = module(x, batch_of(x.shape[1], start), state)
    h = norm(attention, x + y)
    hidden = jax.nn.relu(h @ channel["CoreNet.0.weight"].T + channel["CoreNet.0.bias"])
    return norm(channel, h + hidden @ channel["CoreNet.3.weight"].T + channel["CoreNet.3.bias"]), state


@pytest.mark.parametrize("case", CASES)
def test_layers_over_three_segments(case):
    """In one pass over the row, and segment by segment."""
    of_layer = lambda n, part: weights_of(f"weights/layers/{n}.{part}.")
    weights = [(of_layer(n, "dec_attn"), of_layer(n, "pos_ff")) for n in range(2)]
    modules = [module_of(attention, segment=SEGMENT, **CASES[case]) for attention, _ in weights]
    segments = [rows_first(x) for x in GIVEN[f"layers/{case}/segments"]]
    wanted = jnp.concatenate([rows_first(x) for x in GIVEN[f"layers/{case}/out"]], axis=1)
    h, pieces = jnp.concatenate(segments, axis=1), segments
    for module, given in zip(modules, weights, strict=True):
        h, _ = layer(module, *given, h)
        state, found = module.init_state(ROWS, 3 * SEGMENT), []
        for n, x in enumerate(pieces):
            y, state = layer(module, *given, x, n * SEGMENT, state)
            found.append(y)
        pieces = found
    np.testing.assert_allclose(h, wanted, atol=5e-6)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), wanted, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_the_code(case):
    """Of keys [memory | segment], the memory at most 6 of the tokens before."""
    attention = Attention(heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, rope="none", backend="reference")
    spec = TransformerXL(attention=attention, segment=SEGMENT, memory=MEMORY, **CASES[case])
    tokens = Tokens(*map(np.asarray, tokens_of(batch_of(3 * SEGMENT).info)))
    for sets in (spec.seen, [*spec.near, *spec.far]):
        parts = [mask.visible(tokens.rows(), tokens.columns())[0] for mask, _ in sets]
        assert (sum(part.astype(int) for part in parts) <= 1).all()  # apart
        for n in range(3):
            hidden = np.asarray(GIVEN[f"layers/{case}/mask/{n}"])
            rows, keys = slice(n * SEGMENT, (n + 1) * SEGMENT), slice((n + 1) * SEGMENT - hidden.shape[1], (n + 1) * SEGMENT)
            assert (sum(part[rows, keys] for part in parts) == ~hidden).all()
            assert not any(part[rows, : keys.start].any() for part in parts)
