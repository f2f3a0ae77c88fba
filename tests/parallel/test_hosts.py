"""Who the other processes are; two real ones are in tests/training/test_processes.py."""

import jax
import pytest

from lcx.parallel.hosts import check_joined, join
from lcx.parallel.mesh import MeshSpec
from lcx.spec import SpecError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ("a:1", None, None),
            "ADDRESS=a:1: expected JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID",
        ),
        (("a:1", "two", "0"), "JAX_NUM_PROCESSES=two JAX_PROCESS_ID=0: expected .* the last two as numbers"),
        (("a:1", "2", "2"), "expected an id less than the number of processes"),
        ((None, None, None), "no job found .no address.: expected a TPU slice, Slurm, MPI or Kubernetes, or JAX_COORD"),
    ],
)
def test_a_job_that_is_not_there(monkeypatch, values, message):
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    def initialize(*_):
        raise ValueError("no address.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SpecError, match=message):
        join()


def test_the_environment_names_the_processes(monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *who: given.append(who))
    for name, value in zip(NAMES, ("a:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    join()
    assert given == [("a:1", 4, 3)]


def test_processes_that_have_not_joined_are_refused(monkeypatch):
    check_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SpecError, match="one of 2 processes, which have not joined: start each with --multihost"):
        MeshSpec().build()
