"""Where the time of a run went, XLA's compilation apart from what it was for."""

import collections
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from lcx.inference.compilations import Compilations


class Stopwatch:
    """Seconds by owner and kind of work, kept in the JSON file `path` from start to start. What a kill cuts does not count.

    A context: outside it, compilation is not heard.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.seconds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        if path is not None and path.exists():
            self.seconds |= {owner: collections.Counter(spent) for owner, spent in json.loads(path.read_text()).items()}
        self._heard = Compilations()

    def __enter__(self) -> "Stopwatch":
        self._heard.listen()
        return self

    def __exit__(self, *_) -> None:
        self._heard.close()

    @contextlib.contextmanager
    def on(self, owner: str, kind: str) -> Iterator[None]:
        """Times the block as `kind`, less the compilation inside it, which counts as `compile`."""
        begin, compiled = time.perf_counter(), self._heard.seconds
        try:
            yield
        finally:
            took, compiling = time.perf_counter() - begin, self._heard.seconds - compiled
            self.seconds[owner] += collections.Counter({kind: took - compiling, "compile": compiling})
            self._keep()

    def lines(self) -> list[str]:
        """One line an owner, the longest first in each."""
        spent = lambda kinds: ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in kinds.most_common())
        return [f"{owner}: {kinds.total():.1f} s: {spent(kinds)}" for owner, kinds in self.seconds.items()]

    def _keep(self) -> None:
        if self.path is not None:
            new = self.path.with_name(self.path.name + ".tmp")
            new.write_text(json.dumps(self.seconds, indent=1) + "\n")
            new.replace(self.path)
