"""The TTT layers equal the authors' with their weights: outputs and gradients, rows whose last mini-batch is not whole."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ttt_layers as authors
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.mixers.mixer import Inherited
from lcx.mixers.ttt import TTT
from lcx.parallel.rules import Rules

HEADS, DIM = authors.HEADS, authors.WIDTH // authors.HEADS
FORMS = {"linear": {}, "mlp": {"depth": 2, "rate": 0.1}, "shared": {"shared": True, "gate": True}}


def built(case: str, given: dict[str, np.ndarray]):
    """The layer with the authors' weights."""
    spec = TTT(heads=HEADS, head_dim=DIM, chunk=authors.MINI, **FORMS[case])
    module = spec.build(Inherited(width=authors.WIDTH, depth=1, rope=None, compute="float32", rules=Rules()), rngs=nnx.Rngs(0))
    into = lambda name: given[f"weights/{name}.weight"].T.reshape(-1, HEADS, DIM)
    in_heads = lambda x: x.reshape(*x.shape[:-1], HEADS, DIM)
    values = {"query": into("q_proj"), "value": into("v_proj")}
    values |= {"output": given["weights/o_proj.weight"].T.reshape(HEADS, DIM, -1)}
    values |= {
        "rate": given["weights/learnable_ttt_lr_weight"][:, 0].T,
        "rate_bias": given["weights/learnable_ttt_lr_bias"][:, 0],
    }
    values |= {"place_rate": given["weights/learnable_token_idx"]}
    values |= {f"norm_{part}": given[f"weights/ttt_norm_{part}"] for part in ("weight", "bias")}
    if spec.shared:
        for name in "query", "key":
            kernel = given[f"weights/conv_{name[0]}.weight"][:, 0, ::-1].T
            values |= {f"{name}_kernel": in_heads(kernel), f"{name}_bias": in_heads(given[f"weights/conv_{name[0]}.bias"])}
        values |= {"gate": into("g_proj")}
    else:
        values |= {"key": into("k_proj")}
    for name, value in values.items():
        getattr(module, name)[...] = jnp.asarray(value)
    for n in range(spec.depth):
        module.start[n][...] = jnp.asarray(given[f"weights/W{n + 1}"])
        module.start_bias[n][...] = jnp.asarray(given[f"weights/b{n + 1}"][:, 0])
    for part in "weight", "bias":
        getattr(module.norm, part)[...] = jnp.asarray(given[f"weights/post_norm.{part}"])
    return module


@pytest.mark.parametrize("case", authors.CASES)
def test_the_layer_equals_the_authors(case):
    with np.load(Path(__file__).parent / "golden" / "ttt_layers.npz") as found:
        given = {key.removeprefix(f"{case}/"): found[key] for key in found if key.startswith(f"{case}/")}
    module = built(case, given)
    segments = jnp.ones(given["x"].shape[:2], jnp.int32)
    batch = Batch(tokens=segments, info=causal_info(segments))

    @jax.jit
    @jax.value_and_grad
    def both(x, module, cotangent):
        return (module(x, batch)[0] * cotangent).sum()

    out = jax.jit(lambda module, x: module(x, batch)[0])(module, given["x"])
    np.testing.assert_allclose(out, given["out"], rtol=2e-5, atol=2e-5)
    _, dx = both(jnp.asarray(given["x"]), module, given["cotangent"])
    np.testing.assert_allclose(dx, given["dx"], rtol=1e-4, atol=1e-4)
