"""Devices of a TPU slice that is not there: the real TPU compiler runs on any machine that has libtpu."""

import importlib.util
import math
import os

import jax
from jax.experimental import topologies

from lcx.spec import SpecError

_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# GiB a device that programs may use, by device kind: "available HBM" in what libtpu 0.0.42 says of a program that does not fit.
CHIP_MEMORY = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25, "TPU7x": 94.75}

GRIDS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # sides of a slice
LARGEST = 256  # chips of a slice of two sides


def quiet_without_tpu() -> None:
    """Keeps libtpu, where it is installed for its compiler alone, from complaining that it finds no TPU.

    JAX sets TPU_SKIP_MDS_QUERY when it is imported on a machine without TPU chips.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        for key, value in _WITHOUT_TPU.items():
            os.environ.setdefault(key, value)


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a topology such as `v5e:16x16`, `v5p:8x8x8` or `v6e:16x16`, to compile for, not to run on.

    Call it before anything else touches devices: a machine without a TPU then keeps to its CPU. Raises SpecError if libtpu is
    missing or does not know the name.
    """
    chip, _, shape = name.partition(":")
    sides = shape.split("x")
    if not name:
        raise SpecError("--topology is empty: expected a slice such as v5e:16x16")
    if chip in GRIDS and all(side.isdigit() for side in sides):
        flat = GRIDS[chip] == 2
        if len(sides) != GRIDS[chip] or (flat and math.prod(map(int, sides)) > LARGEST):
            expected = f"two sides, of at most {LARGEST} chips, as 4x4" if flat else "three sides, as 2x2x4"
            raise SpecError(f"--topology={name}: expected {expected}")
    if importlib.util.find_spec("libtpu") is None:
        raise SpecError(f"--topology={name} needs the TPU compiler: install the `tpu` extra (pip install -e '.[tpu]')")
    for key, value in _WITHOUT_TPU.items():
        os.environ.setdefault(key, value)
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    options = {"chips_per_host_bounds": [1, 1, 1]} if shape in ("1x1", "1x1x1") else {}
    options |= {"chip_config_name": "megacore"} if chip == "v4" else {}  # one device a chip
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(f"--topology={name}: expected one such as v5e:16x16, v5p:8x8x8 or v6e:16x16: {reason}") from None
