"""Two processes of four devices each train as one, and stop as one."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_runs as runs

from lcx.training.checkpoint import latest
from lcx.training.loop import train
from lcx.training.writers import read_records


@pytest.fixture
def start(monkeypatch):
    """Starts the two processes on a run."""
    jax.devices()  # this process keeps its own settings
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    context = multiprocessing.get_context("spawn")

    def start(run_dir, steps):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pair = [context.Process(target=runs.run_as_one_of_two, args=(n, port, run_dir, steps)) for n in (0, 1)]
        for process in pair:
            process.start()
        return pair

    return start


def ends(pair):
    for process in pair:
        process.join(timeout=120)
    return [process.exitcode for process in pair]


@pytest.mark.slow
def test_two_processes_train_as_one(start, tmp_path):
    assert ends(start(tmp_path / "two", 6)) == [0, 0]
    train(runs.experiment(steps=6), tmp_path / "one")
    losses = [[record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert train(runs.experiment(steps=8), tmp_path / "two").step == 8  # what two processes saved, one goes on with


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step(start, tmp_path):
    pair, log = start(tmp_path, 100_000), tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(pair[1].pid, signal.SIGTERM)
    assert ends(pair) == [143, 143]
    assert latest(tmp_path) == read_records(log)[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_the_command_on_two_hosts(tmp_path, shared):
    """`experiments.train --multihost`; hosts that do not share the run folder are refused, each with one line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    changes = ("mesh.data=2", "steps=2", "log_every=1", "optimizer.learning_rate.warmup=1", "data.batch_size=4")
    config = ["--config=config:recipes.quick_text.quick", *(f"--config=set:{change}" for change in changes)]
    pair = []
    for host in (0, 1):
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(host)}
        one_device = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
        folder = tmp_path / ("run" if shared else f"run{host}")
        command = [sys.executable, "-m", "experiments.train", "--multihost", *config, f"--run_dir={folder}"]
        pair.append(subprocess.Popen(command, env={**os.environ, **one_device, **job}, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == ([0, 0] if shared else [2, 2]), said
    assert shared or all("process 1 does not see what process 0 writes" in lines and "Traceback" not in lines for lines in said)
