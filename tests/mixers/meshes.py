"""A layer on a mesh gives what it gives without one: outputs, and gradients by parameters and input."""

import jax
import jax.numpy as jnp
import numpy as np

from lcx.parallel.mesh import MeshSpec


def equal_on_a_mesh(module, x, batch, tolerance):
    """tolerance: of the largest entry of each array."""

    def scalar(module, x):
        y = module(x, batch)[0]
        return jnp.sin(y).sum(), y

    both = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
    wanted = both(module, x)
    with jax.set_mesh(MeshSpec(data=2, context=2, tensor=2).build()):
        found = both(module, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()), found, wanted)
