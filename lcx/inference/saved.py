"""What rows have read, in a folder: a prompt is read once and answered later, by another process, on another mesh.

    read = prefill(model, [ids], 1, 256, 512)
    save("book", model, read)
    answers, read = answer(model, restore("book", model), max_new=32)

The folder holds every array of a state, written by Orbax, and what they are of: the fields of the model's spec that a state
goes by, and sums of words, of parameters and arrays. It appears complete or not at all.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, UInt32

from lcx.config_text import fields
from lcx.inference.reading import Consumed, check_not_consumed, nothing_read
from lcx.inference.rereading import settled_slots
from lcx.models.decoder import Decoder, DecoderModel, settled
from lcx.models.light import light
from lcx.spec import SpecError
from lcx.training.checkpoint import readable

ADVICE = "expected a whole folder as `save` wrote it: copy it again, or read the prompts again"
LAYOUT = 1  # of the folder; another one is refused
ELSEWHERE = ("rules", "communication", "remat", "channel_chunk", "gradient_sum")  # fields that leave a state as it is


def save(folder: Path | str, model: DecoderModel, read: Consumed) -> None:
    """Writes to a new folder what rows have read with a model. Raises SpecError if there is one, and
    ValueError if they were consumed by an answer."""
    path = Path(folder).absolute()
    if path.exists():
        raise SpecError(f"{path}: exists already: expected a new folder")
    check_not_consumed(read)
    arrays = _arrays(read)
    meta = {"layout": LAYOUT, "rows": len(read.seen), "room": read.room, "model": _said(model.spec), "words": _words(model)}
    meta["arrays"] = {name: {"shape": leaf.shape, "words": _summed(leaf)} for name, leaf in arrays.items()}
    with _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.Composite(read=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)))


def restore(folder: Path | str, model: DecoderModel) -> Consumed:
    """What `save` wrote, on the ambient mesh as the model's rules say. Raises SpecError if there is none, or it is damaged, or
    of another model: of other parameters, or of another spec, but for how a model lies on devices and whether it is light."""
    path = Path(folder).absolute()
    if not (path / "read").is_dir() or not (path / "meta").is_dir():
        raise SpecError(f"{path}: expected a folder that lcx.inference.saved wrote")
    with _checkpointer() as checkpointer:
        meta = _item(checkpointer, path, "meta", ocp.args.JsonRestore())
        _check(path, meta, model)
        zeros = jnp.zeros(meta["rows"], jnp.int32)
        empty = nothing_read(settled(model), meta["rows"], meta["room"], zeros, zeros.astype(jnp.float32), zeros)
        empty = settled_slots(settled(model), empty)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _arrays(empty))
        _compare(path, {name: tuple(held["shape"]) for name, held in meta["arrays"].items()}, wanted)
        arrays = _item(checkpointer, path, "read", ocp.args.StandardRestore(wanted))
    for name, array in arrays.items():
        if _summed(array) != meta["arrays"][name]["words"]:
            raise SpecError(f"{path}: {name} is not what was saved: its checksum differs; {ADVICE}")
    leaves, structure = jax.tree_util.tree_flatten_with_path(empty)
    return jax.tree.unflatten(structure, [arrays.get(jax.tree_util.keystr(at), leaf) for at, leaf in leaves])


def _item(checkpointer: ocp.Checkpointer, path: Path, name: str, args: ocp.args.CheckpointArgs) -> Any:
    with readable(path / name, lambda: ADVICE):
        return checkpointer.restore(path, args=ocp.args.Composite(**{name: args}))[name]


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _arrays(read: Consumed) -> dict[str, Array]:
    """By name, those that are not empty: Orbax takes no others."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(read) if leaf.size}


def _said(spec: Decoder) -> dict[str, str]:
    return {path: repr(value) for path, value in fields(spec) if path.partition(".")[0] not in ELSEWHERE}


@jax.jit
def _sum(tree: Any) -> UInt32[Array, ""]:
    kinds = lambda leaf: leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    words = [jax.lax.bitcast_convert_type(kinds(x), f"uint{8 * x.dtype.itemsize}") for x in jax.tree.leaves(tree)]
    return sum((word.sum(dtype=jnp.uint32) for word in words), jnp.uint32(0))


def _summed(tree: Any) -> int:
    """All words, modulo 2^32, whatever devices they lie on."""
    return int(_sum(tree))


def _words(model: DecoderModel) -> int:
    """Of the parameters as they are used, whether matrices are held so or not."""
    return int(_used(settled(model)))


@jax.jit
def _used(model: DecoderModel) -> UInt32[Array, ""]:
    return _sum(nnx.to_pure_dict(nnx.state(light(model))))


def _check(path: Path, meta: dict[str, Any], model: DecoderModel) -> None:
    if meta.get("layout") != LAYOUT:
        raise SpecError(f"{path}: layout {meta.get('layout')}: this version reads layout {LAYOUT}")
    held, given = meta["model"], _said(model.spec)
    for name in dict.fromkeys([*held, *given]):
        if held.get(name) != given.get(name):
            raise SpecError(f"{path}: read with model.{name} = {held.get(name)}: expected that, not {given.get(name)}")
    if meta["words"] != _words(model):
        raise SpecError(f"{path}: read with other parameters: expected those of the model that read")


def _compare(path: Path, held: dict[str, tuple[int, ...]], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises SpecError unless arrays have the shapes in which this mesh holds them."""
    for name in sorted(held.keys() | wanted.keys()):
        shape = wanted[name].shape if name in wanted else "absent"
        if held.get(name, "absent") != shape:
            raise SpecError(f"{path}: {name} of {held.get(name, 'absent')}: expected {shape}, as slots lie on this mesh")
