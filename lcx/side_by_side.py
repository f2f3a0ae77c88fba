"""Two programs compared on one machine: each side in processes of its own, in turn, so that what else runs disturbs both."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

ROUNDS, WARM, STEPS = 3, 3, 10  # a process settles over its first steps
HUGE_PAGES = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as the programs start; for both sides


def in_turn(module: str, sides: Sequence[str], number: int, *, rounds: int = ROUNDS) -> dict[str, list[dict]]:
    """What `python -m module side number` printed last, as JSON, of each side and round."""
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, found in runs.items():
            command = [sys.executable, "-m", module, name, str(number)]
            printed = subprocess.run(command, env=HUGE_PAGES, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.append(json.loads(printed.splitlines()[-1]))
    return runs


def timed(once: Callable[[], float], begin: float, *, warm: int = WARM, steps: int = STEPS) -> dict:
    """Seconds from `begin` to the end of the first step, of each step after `warm` more, the peak of memory, the last loss."""
    once()
    first, seconds = time.perf_counter() - begin, []
    for _ in range(warm + steps):
        start = time.perf_counter()
        loss = once()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first": first, "seconds": seconds[warm:], "peak": peak, "loss": loss}
