"""Where the time of a run went, XLA's compilation apart from what it was for."""

import collections
import contextlib
import time
from collections.abc import Iterator

import jax

COMPILE = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event


class Stopwatch:
    """Seconds by owner and kind of work. A context: outside it, compilation is not heard."""

    def __init__(self):
        self.seconds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._compiled = 0.0

    def __enter__(self) -> "Stopwatch":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    @contextlib.contextmanager
    def on(self, owner: str, kind: str) -> Iterator[None]:
        """Times the block as `kind`, less the compilation inside it, which counts as `compile`."""
        begin, compiled = time.perf_counter(), self._compiled
        try:
            yield
        finally:
            took, compiling = time.perf_counter() - begin, self._compiled - compiled
            self.seconds[owner] += collections.Counter({kind: took - compiling, "compile": compiling})

    def lines(self) -> list[str]:
        """One line an owner, the longest first in each."""
        spent = lambda kinds: ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in kinds.most_common())
        return [f"{owner}: {kinds.total():.1f} s: {spent(kinds)}" for owner, kinds in self.seconds.items()]

    def _hear(self, event: str, seconds: float, **_) -> None:
        if event == COMPILE:
            self._compiled += seconds
