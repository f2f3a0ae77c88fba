"""Attention with learned sinks and the weights of `GptOssAttention` gives its outputs and gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sinks
from flax import nnx

from lcx.attention.mask import Causal, Window
from lcx.batch import Batch, causal_info
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited
from lcx.parallel.rules import Rules
from lcx.positions.rope import Rope

MASKS = (Window(size=sinks.WINDOW), Causal())
HEADS = {"query": ("q", sinks.HEADS), "key": ("k", sinks.KV_HEADS), "value": ("v", sinks.KV_HEADS)}


def parameters(held: dict, layer: int) -> dict:
    """transformers' arrays as the mixer's: heads apart, matrices [in, out]."""
    get = lambda name: held[f"{layer}/{name}"]
    split = lambda x, heads: x.reshape(heads, sinks.HEAD_DIM, *x.shape[1:])
    made = {name: np.moveaxis(split(get(f"{own}_proj.weight"), n), 2, 0) for name, (own, n) in HEADS.items()}
    made |= {f"{name}_bias": split(get(f"{own}_proj.bias"), n) for name, (own, n) in HEADS.items()}
    made["output"] = get("o_proj.weight").T.reshape(sinks.HEADS, sinks.HEAD_DIM, sinks.WIDTH)
    return made | {"output_bias": get("o_proj.bias"), "sinks": get("sinks")}


def compare(held: dict, layer: int) -> None:
    sizes = {"heads": sinks.HEADS, "kv_heads": sinks.KV_HEADS, "head_dim": sinks.HEAD_DIM}
    spec = Attention(**sizes, mask=MASKS[layer], bias="all", sinks="learned")
    inherited = Inherited(width=sinks.WIDTH, depth=1, rope=Rope(base=sinks.THETA), compute="float32", rules=Rules())
    graph, state = nnx.split(spec.build(inherited, rngs=nnx.Rngs(0)))
    made = jax.tree.map(jnp.asarray, parameters(held, layer))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, made)
    batch = Batch(tokens=jnp.zeros((1, sinks.LENGTH), jnp.int32), info=causal_info(np.ones((1, sinks.LENGTH), np.int32)))

    @jax.jit
    def run(state, x, d_y):
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x, batch)[0], state, x)
        return y, *pull(d_y)

    y, gradient, d_x = run(state, jnp.asarray(held["x"]), jnp.asarray(held["d_y"]))
    found = {"y": y, "d_x": d_x, "d_sinks": nnx.to_pure_dict(gradient)["sinks"]}
    for name, value in found.items():
        expected = held[f"{layer}/{name}"]
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("layer", [0, 1], ids=["window", "causal"])
def test_golden(layer):
    with np.load(Path(__file__).parent / "golden" / "gpt_oss_attention.npz") as held:
        compare(dict(held), layer)


@pytest.mark.oracle
def test_live():
    compare(sinks.arrays(), 0)
