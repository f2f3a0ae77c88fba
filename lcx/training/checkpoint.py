"""Checkpoints of a run, written asynchronously by Orbax.

`RUN/checkpoints/STEP/` holds four items: `params`, `optimizer`, `data` (the iterator's state, json) and `meta` (json: layout
version, step, steps of the run, tokens so far, identity, a checksum of every array). A step folder appears complete or not at
all. Restoring always takes target shardings, so a checkpoint of eight devices restores on any mesh.
"""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from lcx.interop import hf
from lcx.interop.folder import Folder, is_folder
from lcx.models.decoder import Decoder
from lcx.models.words import check_known
from lcx.parallel.mesh import MeshSpec
from lcx.spec import Spec, SpecError
from lcx.training import shipped
from lcx.training.placement import parameter_shardings
from lcx.training.step import TrainState, abstract_model, bind

LAYOUT = 1  # of the items above; a checkpoint of another layout is refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing(Spec):
    """every: steps between checkpoints; None: only at the end, and when the run is told to stop. keep: how many of the
    newest stay; None: all. keep_every: steps that are multiples of it stay for good.
    """

    every: int | None = None
    keep: int | None = 3
    keep_every: int | None = None

    def validate(self):
        for field in ("every", "keep", "keep_every"):
            self.check(getattr(self, field) is None or getattr(self, field) >= 1, field, "at least 1, or None")

    def due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0


class Checkpoints:
    """The checkpoints of the run that this process trains. A context: leaving it waits for the last one to be written."""

    def __init__(self, run_dir: Path, spec: Checkpointing):
        if jax.process_index() == 0:  # not by the manager, whose thread for it may outlast a start that is refused
            for unfinished in folder(run_dir).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished)
        self._manager = _manager(run_dir, max_to_keep=spec.keep, keep_period=spec.keep_every)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, after waiting for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(self, state: TrainState, *, step: int, data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copies the state to the host, then writes it in the background. A step that exists already is left alone."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave({"layout": LAYOUT, "step": step, "checksums": _checksums(state)} | meta),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state in the shapes and shardings of `target`, data state). Raises SpecError if the parameters are others, or the
        checkpoint is damaged."""
        _compare(self._manager, step, target.params)
        args = {
            "params": ocp.args.StandardRestore(target.params),
            "optimizer": ocp.args.StandardRestore(target.optimizer),
            "data": ocp.args.JsonRestore(),
        }
        found = {name: _item(self._manager, step, name, arg) for name, arg in args.items()}
        for name in ("params", "optimizer"):
            _verify(self._manager, step, name, found[name])
        count = jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), target.step.sharding)
        return TrainState(params=found["params"], optimizer=found["optimizer"], step=count), found["data"]

    def meta(self, step: int) -> dict[str, Any]:
        """What the checkpoint belongs to. Raises SpecError if its layout is not the one of this version."""
        return _meta(self._manager, step)


def folder(run_dir: Path | str) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir).absolute() / "checkpoints"


def latest(run_dir: Path | str) -> int | None:
    """The newest complete step of a run, or the step of a shipped model, or None; 0 for a checkpoint folder of
    `transformers`. Reads only."""
    if is_folder(run_dir):
        return 0
    if not folder(run_dir).is_dir():
        return shipped.step(Path(run_dir))
    with _manager(run_dir, create=False) as manager:
        return manager.latest_step()


def restore_params(run_dir: Path | str, target: Any, *, step: int | None = None) -> Any:
    """Parameters of a run (its newest step by default) in the shapes and shardings of `target`, a pure dict of shapes.

    Raises SpecError if there is no such step, its layout is unknown, or it holds other parameters.
    """
    newest = latest(run_dir)
    if newest is None:
        raise SpecError(f"{folder(run_dir)}: no checkpoint")
    step = newest if step is None else step
    if is_folder(run_dir) and step == newest:
        return hf.restore(Folder(Path(run_dir)), target)
    if shipped.step(Path(run_dir)) == step:
        return shipped.restore(Path(run_dir), target)
    if not folder(run_dir).is_dir():
        raise SpecError(f"{run_dir}: no checkpoint of step {step}; there are [{newest}]")
    with _manager(run_dir, create=False) as manager:
        if step not in manager.all_steps():
            raise SpecError(f"{folder(run_dir)}: no checkpoint of step {step}; there are {sorted(manager.all_steps())}")
        _meta(manager, step)
        _compare(manager, step, target)
        params = _item(manager, step, "params", ocp.args.StandardRestore(target))
        _verify(manager, step, "params", params)
        return params


def load_model(run_dir: Path | str, spec: Decoder, *, step: int | None = None, mesh: Mesh | None = None) -> nnx.Module:
    """The trained model of a run for evaluation, on `mesh` (default: one device), under `spec`.

    The spec may be an edit of the one that was trained (another rope, mask, cache) as long as its parameters are the same.
    Those that a folder of `transformers` holds in bfloat16 stay so in a model that computes in it. Raises SpecError as
    `restore_params` does, and for a cache with tables of other parameters.
    """
    mesh = MeshSpec().build(jax.local_devices()) if mesh is None else mesh
    graph, state = abstract_model(spec)
    narrow = hf.narrow(Folder(Path(run_dir))) if is_folder(run_dir) and spec.compute == "bfloat16" else set()

    def place(path, leaf, sharding):
        dtype = "bfloat16" if tuple(key.key for key in path) in narrow else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    target = jax.tree_util.tree_map_with_path(place, nnx.to_pure_dict(state), parameter_shardings(state, spec.rules, mesh))
    model = bind(graph, state, restore_params(run_dir, target, step=step))
    check_known(spec, model)
    return model


def _manager(run_dir: Path | str, **options: Any) -> ocp.CheckpointManager:
    arrays, json = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handlers = {"params": arrays(), "optimizer": arrays(), "data": json(), "meta": json()}
    return ocp.CheckpointManager(folder(run_dir), options=ocp.CheckpointManagerOptions(**options), item_handlers=handlers)


def _meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    meta = _item(manager, step, "meta", ocp.args.JsonRestore())
    if meta.get("layout") != LAYOUT:
        raise SpecError(
            f"{manager.directory}/{step}: checkpoint layout {meta.get('layout')}; this version reads layout {LAYOUT}"
        )
    return meta


def _item(manager: ocp.CheckpointManager, step: int, name: str, args: ocp.args.CheckpointArgs) -> Any:
    with _readable(manager, step, name):
        return manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]


def _readable(manager: ocp.CheckpointManager, step: int, name: str) -> contextlib.AbstractContextManager[None]:
    """`readable`, with which other step there is."""
    path = Path(manager.directory) / str(step)

    def advice():
        others = [other for other in manager.all_steps() if other != step]
        return f"delete {path} to go on from step {max(others)}, or ask for that step" if others else "there is no other step"

    return readable(path / name, advice)


@contextlib.contextmanager
def readable(item: Path, advice: Callable[[], str]) -> Iterator[None]:
    """Turns whatever goes wrong while an item, a folder, is read into one SpecError, with advice."""
    before = sys.unraisablehook
    late = lambda found: None if "Event loop is closed" in f"{found.exc_value} {found.exc_value.__context__}" else before(found)
    sys.unraisablehook = late  # after the first failure TensorStore's other reads report to a loop that has ended
    try:
        if not item.is_dir():
            raise FileNotFoundError("it is not there")
        yield
        sys.unraisablehook = before
    except (SpecError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax and TensorStore raise nothing narrower
        reason = (str(error).splitlines() or [""])[0][:200]
        raise SpecError(f"{item}: cannot be read ({type(error).__name__}: {reason}); {advice()}") from error


def _checksums(state: TrainState) -> dict[str, dict[str, int]]:
    """Of every array, where one process holds them whole."""
    if jax.process_count() > 1:
        return {}
    return {name: _sums(getattr(state, name)) for name in ("params", "optimizer")}


def _sums(tree: Any) -> dict[str, int]:
    """The sum of every array's words, modulo 2^32: any one altered word shows, and the sharding does not matter."""
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        words = [np.add.reduce(shard.reshape(-1).view(f"u{shard.itemsize}"), dtype=np.uint32) for shard in shards]
        sums[jax.tree_util.keystr(path)] = sum(map(int, words)) % (1 << 32)
    return sums


def _verify(manager: ocp.CheckpointManager, step: int, name: str, tree: Any) -> None:
    """Raises SpecError if an array is not the one that was saved. Earlier versions and several processes keep no checksums."""
    held = _meta(manager, step).get("checksums", {}).get(name, {}) if jax.process_count() == 1 else {}
    with _readable(manager, step, name):
        for leaf, found in (_sums(tree) if held else {}).items():
            if held.get(leaf, found) != found:
                raise ValueError(f"{leaf} is not what was saved: its checksum differs")


def _compare(manager: ocp.CheckpointManager, step: int, target: Any) -> None:
    """Raises SpecError, naming the first difference, unless the checkpoint holds the target's parameters."""
    with _readable(manager, step, "params"):
        held = _shapes(manager.item_metadata(step)["params"].tree)
    wanted = _shapes(target)
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            found, asked = (side.get(name, "absent") for side in (held, wanted))
            raise SpecError(f"{manager.directory}/{step}: parameter {name} is {found} in the checkpoint, {asked} in the model")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}
