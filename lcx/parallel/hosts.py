"""Several processes as one: every host runs the same command, and they join before anything touches a device."""

import os
import secrets
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lcx.spec import SpecError

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PATIENCE = 10.0  # seconds that a network file system may take to show a new file


def join() -> None:
    """Joins the other processes of the job.

    JAX knows them on a Cloud TPU slice, under Slurm, MPI and Kubernetes. Elsewhere JAX_COORDINATOR_ADDRESS (host:port of the
    first), JAX_NUM_PROCESSES and JAX_PROCESS_ID name them. Raises SpecError if nothing says who they are.
    """
    given = {name: os.environ[name] for name in _NAMES if name in os.environ}
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    if given and (len(given) < len(_NAMES) or not all(given[name].isdecimal() for name in _NAMES[1:])):
        raise SpecError(f"--multihost: {shown}: expected {', '.join(_NAMES)} together, the last two as numbers")
    address, count, process = (given[_NAMES[0]], *(int(given[name]) for name in _NAMES[1:])) if given else (None,) * 3
    if given and process >= count:
        raise SpecError(f"--multihost: {shown}: expected an id less than the number of processes")
    try:
        jax.distributed.initialize(address, count, process)
    except ValueError as error:
        found = f"expected a TPU slice, Slurm, MPI or Kubernetes, or {', '.join(_NAMES)}"
        raise SpecError(f"--multihost: no job found ({str(error).rstrip('.')}): {found}") from None


def check_joined() -> None:
    """Raises SpecError if there are other processes that this one has not joined."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise SpecError(f"this is one of {jax.process_count()} processes, which have not joined: start each with --multihost")


def check_shared(folder: Path) -> None:
    """Every process calls it, with the folder that process 0 has made. Raises SpecError unless they all see one folder."""
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    token = int(multihost_utils.broadcast_one_to_all(np.asarray(secrets.randbits(31), np.int32)))
    mark = folder / f".seen-{token}"
    if first:
        mark.touch()
    multihost_utils.sync_global_devices(f"run folder {token}")
    deadline = time.monotonic() + _PATIENCE
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = np.ravel(multihost_utils.process_allgather(np.asarray(seen)))
    if first:
        mark.unlink()
    if not seen.all():
        blind = ", ".join(str(process) for process in np.flatnonzero(~seen))
        raise SpecError(
            f"run folder {folder}: process {blind} does not see what process 0 writes: expected one that all hosts share"
        )
