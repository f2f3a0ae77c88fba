"""The folder of a run: one config, and what is needed to repeat the run from the folder alone.

config.json    the whole config, defaults written out; `--config=config_file:<folder>/config.json` repeats the run
config.txt     the same for people, one field a line
starts.jsonl   one record a start: time, command, versions, commit, devices, seed
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from lcx.config import build, dumps, loads
from lcx.config_text import first_difference, render
from lcx.parallel.hosts import check_shared
from lcx.spec import Spec, SpecError, fingerprint

CONFIG = "config.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "lcx")


def open_run(path: Path | str, spec: Spec) -> Path:
    """The folder of a run of `spec`, made or found again. Process 0 writes; every process checks.

    A folder keeps to one config. What `spec.identity()` leaves out (the mesh, the number of steps) may change from start to
    start, and is recorded. Raises SpecError for a folder of another config or of other files.
    """
    path = Path(path)
    held = _held(path)
    changed = None if held is None else first_difference(held, spec)
    if held is not None and changed is not None and not _continues(held, spec):
        raise SpecError(
            f"run folder {path} holds config {fingerprint(held)}, this one is {fingerprint(spec)}: "
            f"they differ first in {changed}; give another --run_dir"
        )
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / "starts.jsonl", "a") as starts:
            starts.write(json.dumps({**environment(spec), "changed": changed}) + "\n")
        if held is None or changed is not None:
            (path / "config.txt").write_text(render(spec) + "\n")
            (path / "config.json.tmp").write_text(dumps(spec))
            (path / "config.json.tmp").replace(path / CONFIG)
    check_shared(path)
    return path


def read_config(path: Path | str) -> Spec:
    """The config of a run folder. Raises SpecError if there is none, or this version cannot read it."""
    held = _held(Path(path))
    if held is None:
        raise SpecError(f"run folder {path}: no {CONFIG}; expected the folder of an earlier run")
    return held


def environment(spec: Spec) -> dict[str, Any]:
    """What else decides the result of a run. `commit` is None outside a checkout; it ends in `+` where files were changed."""
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "fingerprint": fingerprint(spec),
        "seed": getattr(spec, "seed", None),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "system": platform.platform(),
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
    }


def _held(path: Path) -> Spec | None:
    """The config already in the folder; None for a new folder."""
    if not path.exists():
        return None
    if not path.is_dir():
        raise SpecError(f"run folder {path}: is a file; give another --run_dir")
    if not (path / CONFIG).is_file():
        if any(child.name not in ("starts.jsonl", "config.txt", "config.json.tmp") for child in path.iterdir()):
            raise SpecError(f"run folder {path}: holds files but no {CONFIG}; give a new or empty --run_dir")
        return None
    try:
        return build(loads((path / CONFIG).read_text()))
    except SpecError as error:
        raise SpecError(f"{path / CONFIG}: {error}") from None


def _continues(held: Spec, spec: Spec) -> bool:
    return type(held) is type(spec) and hasattr(spec, "identity") and held.identity() == spec.identity()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(Path(__file__).parent), *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
