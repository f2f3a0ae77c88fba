"""Every pod config names its slice, has a device of the mesh for each of its chips, and fits them, says the TPU compiler."""

import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys

import pytest

from configs.pods import llama, memory, serving
from lcx.support import validate, validate_serving


def configs_of(*modules):
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": config
        for module in modules
        for name, config in inspect.getmembers(module, inspect.isfunction)
        if config.__module__ == module.__name__ and not name.startswith("_")
    }


PODS, SERVING = configs_of(llama, memory), configs_of(serving)


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")


def slice_of(config):
    return re.search(r"`(v\w+:[\dx]+)`", config.__doc__)[1]


@pytest.mark.parametrize("name", PODS | SERVING)
def test_the_mesh_is_the_whole_slice(name):
    config = (PODS | SERVING)[name]
    (validate if name in PODS else validate_serving)(config())
    assert config().mesh.size == math.prod(map(int, slice_of(config).partition(":")[2].split("x")))


def planned(name, *changes):
    """What `plan` prints of the config on its slice."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    given = [f"--config=config:pods.{name}", *(f"--config=set:{change}" for change in changes)]
    program = [sys.executable, "-m", "experiments.plan", *given, f"--topology={slice_of((PODS | SERVING)[name])}"]
    run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", PODS)
def test_the_training_step_fits_the_slice(name):
    said = planned(name)
    assert re.search(r"^fits +yes, by", said, re.MULTILINE), said[-2000:]
    sent = dict(re.findall(r"^([\w-]+) bytes sent a device and step\D* ([\d,]+)$", said, re.MULTILINE))
    gathered, reduced = (int(sent[kind].replace(",", "")) for kind in ("all-gather", "all-reduce"))
    assert reduced < gathered / 10  # weights are not all-reduced


@pytest.mark.slow
@needs_compiler
def test_answers_are_planned():
    """Two layers: a token sums what two matrices a layer and the embeddings write to the stream, and little beside."""
    said = planned("serving.llama3_8b_128k", "model.periods=2", "prompt=4096", "answer=1000")
    assert len(re.findall(r"^.*: fits +yes, by", said, re.MULTILINE)) == 2, said[-2000:]
    number = lambda name: float(re.search(rf"^{name} +([\d,.]+)$", said, re.MULTILINE)[1].replace(",", ""))
    held, slots = number("state bytes a device"), 2 * 2 * (4096 + 1024)  # layers, rows, tokens
    assert 0 <= held - slots * (2 * 128 * 2 + 6 * 4) < 1024  # one key head a device
    sent, summed = (
        number("answers, a token: all-reduce bytes sent a device"),
        2 * (2 * 2 + 1) * 4096 * 2,
    )  # two rows of the stream
    assert summed * 2 * 7 / 8 <= sent < 1.1 * summed * 2 * 7 / 8
    read = number("parameter bytes a device") + held
    assert number("ms to read parameters and the state once, as a token does") == pytest.approx(1e3 * read / 819e9, rel=1e-3)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", SERVING)
def test_prompts_are_answered_on_the_slice(name):
    said = planned(name)
    assert len(re.findall(r"^.*: fits +yes, by", said, re.MULTILINE)) == 2, said[-2000:]
