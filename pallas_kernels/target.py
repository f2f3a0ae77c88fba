"""What a program is being built for, which need not be the machine that builds it."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the ambient mesh's devices, a described topology included; without a mesh, of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.default_backend() if device is None else device.platform
    return "gpu" if found in ("cuda", "rocm") else found


def on_one_device() -> bool:
    """Whether what is computed is of what one device holds: without a mesh, or within `shard_map`. XLA shares no kernel out."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def device_kind() -> str:
    """The kind of those devices, such as `TPU v5 lite` or `NVIDIA H200`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Of a matrix product: float32 operands are multiplied as float32, which TPUs and GPUs by default do not."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


@functools.cache
def log_once(message: str) -> None:
    """Says which form or size was chosen, the first time that it is."""
    logging.getLogger("pallas_kernels").info(message)
