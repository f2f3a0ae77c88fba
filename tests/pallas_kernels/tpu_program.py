"""Programs that compile for described TPU devices, each a process: a compiler that aborts ends this, not the tests."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
CHIPS = [pytest.param(chip, marks=() if chip == "v5e" else pytest.mark.slow) for chip in TOPOLOGIES]
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")


def lines(file: str, *arguments: str) -> list[dict]:
    """What the file prints as a program, a line of JSON each."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, file, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@contextlib.contextmanager
def one_device(chip: str):
    """The device of a mesh in use."""
    import jax
    import numpy as np

    from lcx.parallel.topology import topology_devices
    from pallas_kernels.tpu_chips import this_chip

    device = topology_devices(TOPOLOGIES[chip])[0]
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("one",))):
        assert this_chip() == chip
        yield device
