"""The folder of a run: one config, and what is needed to repeat the run from the folder alone.

config.json    the whole config, defaults written out; `--config=config_file:<folder>/config.json` repeats the run
config.txt     the same for people, one field a line
starts.jsonl   one record a start: time, command, versions, commit, devices, and the seed where the config has one
lock           held by the process that trains in the folder
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lcx.config import build, dumps, load_file
from lcx.config_text import first_difference, render
from lcx.interop import peft
from lcx.interop.folder import is_folder
from lcx.parallel.hosts import check_shared
from lcx.spec import Spec, SpecError, fingerprint
from lcx.training import shipped
from lcx.training.pretrained import pretrained

CONFIG = "config.json"
LOCK = "lock"
_NO_RUN_YET = {"starts.jsonl", "config.txt", "config.json.tmp", LOCK}  # what a refused start may leave
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "lcx")


def open_run(path: Path | str, spec: Spec) -> Path:
    """The folder of a run of `spec`, made or found again. Process 0 writes; every process checks.

    A folder keeps to one config. What `spec.identity()` leaves out (the mesh, the number of steps) may change from start to
    start, and is recorded. Raises SpecError for a folder of another config, of a shipped model or of other files.
    """
    path = Path(path)
    check_config(path, spec)
    if jax.process_index() == 0:
        _make(path)
        record_start(path, spec)
    check_shared(path)
    return path


def check_config(path: Path, spec: Spec) -> None:
    """Raises SpecError for a folder of another config, of a shipped model or of other files. Reads only."""
    check_not_shipped(path)
    held = _held(path)
    if held is None and _contents(path) - _NO_RUN_YET:
        raise SpecError(f"run folder {path}: holds files but no {CONFIG}; give a new or empty --run_dir")
    changed = None if held is None else first_difference(held, spec)
    if held is not None and changed is not None and not _continues(held, spec):
        raise SpecError(
            f"run folder {path} holds config {fingerprint(held)}, this one is {fingerprint(spec)}: "
            f"they differ first in {changed}; give another --run_dir"
        )


def check_not_shipped(path: Path) -> None:
    """Raises SpecError for the folder of a shipped model, or one of `transformers`, which no run changes."""
    if is_folder(path):
        raise SpecError(
            f"run folder {path}: holds a checkpoint of transformers, which stays as it is; to train on from it, give another "
            f"--run_dir, with init_from={path}"
        )
    if (path / shipped.WEIGHTS).is_file():
        raise SpecError(
            f"run folder {path}: holds a shipped model ({shipped.WEIGHTS}), which stays as it is; to train on from it, give "
            f"another --run_dir, with init_from={path}"
        )


def record_start(path: Path, spec: Spec) -> None:
    """Writes down a start of `spec`, which every check has let pass, in a folder that is there. Process 0 only."""
    held = _held(path)
    changed = None if held is None else first_difference(held, spec)
    with open(path / "starts.jsonl", "a") as starts:
        starts.write(json.dumps({**environment(spec), "changed": changed}) + "\n")
    if held is None or changed is not None:
        (path / "config.txt").write_text(render(spec) + "\n")
        (path / "config.json.tmp").write_text(dumps(spec))
        (path / "config.json.tmp").replace(path / CONFIG)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """The folder, made where it is new, to this run alone while the context lasts.

    Process 0 makes and locks it; every process enters. Raises SpecError if it cannot be made, another process holds it or not
    all processes see it. A file system without locks is trusted.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            _make(path)
            lock = stack.enter_context(open(path / LOCK, "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = (path / LOCK).read_text() or "another process"
                raise SpecError(f"run folder {path}: {holder} trains in it now; wait, or give another --run_dir") from None
            except OSError:
                pass
            lock.truncate(0)
            print(f"process {os.getpid()} of {platform.node()}", end="", file=lock, flush=True)
        check_shared(path)
        yield


def read_config(path: Path | str) -> Spec:
    """The config of a run folder. Raises SpecError if there is none, or this version cannot read it."""
    held = _held(Path(path))
    if held is None:
        raise SpecError(f"run folder {path}: no {CONFIG}; expected the folder of an earlier run")
    return held


def read_trained(model: Path | str) -> Spec:
    """The config of a trained model: of its run folder, a shipped one by name, or a checkpoint folder of `transformers`.

    Raises SpecError as `read_config`."""
    folder = shipped.run_folder(model)
    if is_folder(folder):
        return pretrained(folder)
    if not (folder / CONFIG).is_file():
        kinds = f"a training run, a checkpoint of transformers, or a shipped model ({', '.join(shipped.names())})"
        wanted = f"expected the folder of {kinds}"
        if (folder / peft.CONFIG).is_file():
            merged = "a folder that it was merged into, by convert --format=hf of its run or by peft's merge_and_unload"
            wanted = f"{peft.CONFIG}, of an adapter, is not read back: expected {merged}"
        raise SpecError(f"model {str(model)!r}: the folder holds no {CONFIG}: {wanted}")
    return read_config(folder)


def environment(spec: Spec) -> dict[str, Any]:
    """What else decides the result of a run. `commit` is None outside a checkout; it ends in `+` where files were changed."""
    device = jax.devices()[0]
    seeded = next((part for part in (spec, getattr(spec, "base", None)) if hasattr(part, "seed")), None)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "fingerprint": fingerprint(spec),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "system": platform.platform(),
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
    } | ({} if seeded is None else {"seed": seeded.seed})


def _held(path: Path) -> Spec | None:
    """The config already in the folder; None for a folder without one."""
    _contents(path)
    if not (path / CONFIG).is_file():
        return None
    try:
        return build(load_file(path / CONFIG))
    except SpecError as error:
        raise SpecError(f"{path / CONFIG}: {error}") from None


def _contents(path: Path) -> set[str]:
    """Names of what is in the folder; none for a new one. Raises SpecError if it cannot be read or is a file."""
    try:
        if not path.exists():
            return set()
        held = {child.name for child in path.iterdir() if not _left_empty(child)} if path.is_dir() else set()
    except OSError as error:
        raise SpecError(f"run folder {path}: cannot be read: {error.strerror}; give another --run_dir") from None
    if not path.is_dir():
        raise SpecError(f"run folder {path}: is a file; give another --run_dir")
    return held


def _left_empty(path: Path) -> bool:
    """Whether this is a folder that a training made and, cut off or refused, put nothing in."""
    return (path.parent / LOCK).exists() and path.is_dir() and not any(path.iterdir())


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"run folder {path}: cannot be made: {error.strerror}; give another --run_dir") from None
    if not os.access(path, os.W_OK):
        raise SpecError(f"run folder {path}: may not be written to; give another --run_dir")


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
