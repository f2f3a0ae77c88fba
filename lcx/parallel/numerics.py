"""Errors of a weight's gradient that devices sum, against float64: a table of docs/numerics.md.

    python -m lcx.parallel.numerics

A matrix of 512 x 512, bfloat16 inputs and cotangents of 512 tokens a device, eight forced CPU devices that share out the
matrix. An error is of all entries (root of the mean square) or the largest, over the largest entry. `hop by hop`: sums are
rounded to bfloat16 after each device that adds to them, as reduce-scatters around rings may do it; what becomes of a sum in
bfloat16 is up to the platform, and a CPU takes it in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lcx.linear import GradientSum, linear
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules

DEVICES, SIZE, TOKENS = 8, 512, 512
MESHES = ((8,), (8, 8), (16, 32))  # hop by hop, one axis after the other


def given(devices: int) -> tuple[Float[Array, "devices T M"], Float[Array, "devices T M"]]:
    """Inputs and cotangents of each device's tokens, both with a mean, so that the gradient is no sum of noise alone."""
    x, slope = jax.random.normal(jax.random.key(0), (2, devices, TOKENS, SIZE)) + 0.1
    return x.astype(jnp.bfloat16), slope.astype(jnp.bfloat16)


def exact(x: Float[Array, "devices T M"], slope: Float[Array, "devices T M"]) -> np.ndarray:
    wide = (np.asarray(a, np.float64).reshape(-1, SIZE) for a in (x, slope))
    return next(wide).T @ next(wide)


def summed(x: Float[Array, "devices T M"], slope: Float[Array, "devices T M"], gradient_sum: GradientSum) -> Array:
    """The gradient as `linear` gives it on a mesh."""
    mesh, rules = MeshSpec(fsdp=DEVICES).build(), Rules()
    with jax.set_mesh(mesh):

        def product(matrix, x):
            return linear(x, nnx.Param(matrix, axes=("width", None)), rules, gradient_sum=gradient_sum)

        place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
        matrix = place(jnp.zeros((SIZE, SIZE)))
        return jax.jit(lambda matrix, x, slope: jax.vjp(product, matrix, x)[1](slope)[0])(matrix, place(x), place(slope))


@functools.partial(jax.jit, static_argnums=2)
def hop_by_hop(x: Float[Array, "devices T M"], slope: Float[Array, "devices T M"], sizes: tuple[int, ...]) -> Array:
    """Over rings along mesh axes of these sizes."""
    parts = jax.lax.map(lambda d: jnp.matmul(d[0].T, d[1], preferred_element_type=jnp.float32).astype(jnp.bfloat16), (x, slope))
    rounded = lambda total, part: ((total.astype(jnp.float32) + part.astype(jnp.float32)).astype(jnp.bfloat16), None)
    parts = parts.reshape(*sizes, SIZE, SIZE)
    for _ in sizes:
        parts = jax.lax.scan(rounded, jnp.zeros_like(parts[0]), parts)[0]
    return parts


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print("| devices | sum | root of the mean square | largest |\n|---:|---|---:|---:|")
    forms = {name: functools.partial(summed, gradient_sum=name) for name in ("float32", "compute")}
    rows = [((DEVICES,), *form) for form in forms.items()]
    rows += [(sizes, "bfloat16, hop by hop", lambda x, slope, sizes=sizes: hop_by_hop(x, slope, sizes)) for sizes in MESHES]
    for sizes, name, form in rows:
        x, slope = given(math.prod(sizes))
        wanted = exact(x, slope)
        error = (np.asarray(form(x, slope), np.float64) - wanted) / np.abs(wanted).max()
        print(
            f"| {' x '.join(map(str, sizes))} | {name} | {np.sqrt(np.square(error).mean()):.1e} | {np.abs(error).max():.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
