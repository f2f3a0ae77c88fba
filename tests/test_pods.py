"""Every pod config names its slice, has a device of the mesh for each of its chips, and fits them, says the TPU compiler."""

import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys

import pytest

from configs.pods import llama, memory
from lcx.support import validate

PODS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": config
    for module in (llama, memory)
    for name, config in inspect.getmembers(module, inspect.isfunction)
    if config.__module__ == module.__name__ and not name.startswith("_")
}


def slice_of(config):
    return re.search(r"`(v\w+:[\dx]+)`", config.__doc__)[1]


@pytest.mark.parametrize("name", PODS)
def test_the_mesh_is_the_whole_slice(name):
    experiment = PODS[name]()
    validate(experiment)
    assert experiment.mesh.size == math.prod(map(int, slice_of(PODS[name]).partition(":")[2].split("x")))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize("name", PODS)
def test_the_training_step_fits_the_slice(name):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-m", "experiments.plan", f"--config=config:pods.{name}"]
    run = subprocess.run(
        [*program, f"--topology={slice_of(PODS[name])}"], env=environment, capture_output=True, text=True, timeout=3600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"^fits +yes, by", run.stdout, re.MULTILINE), run.stdout[-2000:]
    sent = dict(re.findall(r"^([\w-]+) bytes sent a device and step\D* ([\d,]+)$", run.stdout, re.MULTILINE))
    gathered, reduced = (int(sent[kind].replace(",", "")) for kind in ("all-gather", "all-reduce"))
    assert reduced < gathered / 10  # weights are not all-reduced
