"""Gradients of projections on a mesh are rounded before or after devices sum them, as a model says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.linear import linear
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules


@pytest.mark.parametrize("gradient_sum, least, most", [("compute", 1e-3, 1e-2), ("float32", 0, 1e-6)])
def test_the_gradient_of_a_matrix_over_eight_devices(gradient_sum, least, most):
    x, slope = jax.random.normal(jax.random.key(0), (2, 8, 64, 16)).astype(jnp.bfloat16)
    wide = (np.asarray(a, np.float64).reshape(-1, 16) for a in (x, slope))
    wanted = next(wide).T @ next(wide)

    def product(matrix):
        return linear(x, nnx.Param(matrix, axes=("width", None)), Rules(), gradient_sum=gradient_sum)

    with jax.set_mesh(MeshSpec(fsdp=8).build()):
        (found,) = jax.jit(lambda matrix: jax.vjp(product, matrix)[1](slope))(jnp.zeros((16, 16)))
    assert least <= np.abs(found - wanted).max() / np.abs(wanted).max() <= most


@pytest.mark.parametrize("gradient_sum, dtypes", [("compute", {"bf16"}), ("float32", {"f32"})])
def test_every_projection_of_a_decoder_sums_in_what_it_says(gradient_sum, dtypes, monkeypatch):
    """As traced for a TPU; a CPU sums in float32 anyway."""
    monkeypatch.setattr("lcx.parallel.gathered.platform", lambda: "tpu")
    layer = Layer(mixer=Attention(heads=2, kv_heads=2, head_dim=4), channel=GLU(hidden=16))
    options = {"compute": "bfloat16", "gradient_sum": gradient_sum}
    spec = Decoder(vocab=32, width=8, pattern=(layer,), periods=1, **options)
    graph, state = nnx.split(nnx.eval_shape(lambda: spec.build(rngs=nnx.Rngs(0))))
    batch = Batch(tokens=jnp.zeros((4, 8), jnp.int32), info=causal_info(np.ones((4, 8), np.int32)))
    with jax.set_mesh(MeshSpec(fsdp=4).build()):
        program = str(jax.make_jaxpr(jax.grad(lambda state: nnx.merge(graph, state)(batch)[0].astype("float32").sum()))(state))
    found = re.findall(r":(\w+)\[[\d,]*\] = reduce_scatter\[", program)
    assert len(found) == 7 and set(found) == dtypes
