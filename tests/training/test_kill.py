"""kill -9 at random steps and inside asynchronous saves: the run still ends with the bits of an uninterrupted one.

The child processes are forked from a server that has imported everything and started no backend, and share a compile cache.
"""

import multiprocessing
import os
import random
import signal
import time

import jax
import numpy as np
import pytest
import tiny_runs as runs

from lcx.training.checkpoint import folder, restore_params
from lcx.training.step import TrainStep
from lcx.training.writers import read_records

EVERY, STRIDE = 3, 12  # steps between saves; most steps that a child makes before it is killed


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Starts the run in a child process."""
    jax.devices()  # this process keeps its own settings
    before = dict(os.environ)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs"])

    def start(run_dir, steps):
        child = context.Process(target=runs.run_in_child, args=(run_dir, steps, EVERY))
        child.start()
        return child

    yield start
    os.environ.clear()
    os.environ |= before


def steps_made(run_dir) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def unfinished(run_dir):
    return [path for path in folder(run_dir).glob("*") if "orbax-checkpoint-tmp" in path.name]


def wait(child, run_dir, step: int) -> None:
    """Until the child has made `step` steps or ended."""
    deadline = time.monotonic() + 120
    while child.is_alive() and steps_made(run_dir) < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)


def kill(child, run_dir, step: int, *, while_saving: bool) -> bool:
    """Kills the child once it has made `step` steps, if asked at the first sight of a save after them. Whether it was alive."""
    wait(child, run_dir, step)
    while while_saving and child.is_alive() and not unfinished(run_dir):
        time.sleep(0.0005)
    alive = child.is_alive()
    child.kill()
    child.join()
    return alive


def check(children, tmp_path, rounds: int) -> None:
    steps = (rounds + 1) * STRIDE
    whole = children(tmp_path / "whole", steps)
    wait(whole, tmp_path / "whole", 1)
    broken, chance, killed, in_save = tmp_path / "broken", random.Random(0), 0, 0
    for n in range(rounds):
        child = children(broken, steps)
        target = min(steps_made(broken), n * STRIDE) + chance.randint(1, STRIDE)
        killed += kill(child, broken, target, while_saving=n % 2 == 1)
        in_save += bool(unfinished(broken))
    last = children(broken, steps)
    for child in (last, whole):
        child.join(timeout=200)
        assert child.exitcode == 0
    assert killed == rounds
    assert in_save >= rounds // 2
    experiment = runs.experiment(steps=steps, every=EVERY)
    mesh = experiment.mesh.build()
    step = TrainStep(
        model=experiment.model, objective=experiment.objective, optimizer=experiment.optimizer, mesh=mesh, steps=steps
    )
    target = step.abstract_state().params
    found, wanted = (restore_params(tmp_path / name, target, step=steps) for name in ("broken", "whole"))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, want)
    logs = [read_records(tmp_path / name / "metrics.jsonl") for name in ("broken", "whole")]
    assert [(r["step"], r["loss"]) for r in logs[0]] == [(r["step"], r["loss"]) for r in logs[1]]
    assert [r["step"] for r in logs[1]] == list(range(1, steps + 1))


@pytest.mark.slow
def test_two_kills(children, tmp_path):
    check(children, tmp_path, rounds=2)


@pytest.mark.slow
def test_fifty_kills(children, tmp_path):
    check(children, tmp_path, rounds=50)


def test_sigterm_ends_a_process_with_status_143(children, tmp_path):
    child = children(tmp_path, 100_000)
    wait(child, tmp_path, 2)
    os.kill(child.pid, signal.SIGTERM)
    child.join(timeout=60)
    assert child.exitcode == 143
