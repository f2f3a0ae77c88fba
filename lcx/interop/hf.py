"""Decoders from checkpoint folders of `transformers`, and folders from decoders.

Tensors go one at a time, in blocks, from the file to where the mesh has them: a host holds a few blocks beside the model. What
comes out of a folder and what goes into one are the same numbers: a folder that is read and written again has the same tensors,
bit by bit.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lcx.interop.families import family_for, family_of
from lcx.interop.families.config import Config
from lcx.interop.families.family import Family, same_model
from lcx.interop.folder import BESIDE, CONFIG, INDEX, SINGLE, Folder, forget, is_folder, written_whole
from lcx.interop.tensors import Part, Tensor
from lcx.models.decoder import Decoder
from lcx.spec import SpecError

HEAD = "lm_head.weight"
SHARD = 2 << 30  # bytes of a file that is written
BLOCK = 32 << 20  # bytes of a tensor that are on their way at a time
NUMBERS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_log = logging.getLogger(__name__)


def read_decoder(folder: Folder) -> tuple[Decoder, int]:
    """(the decoder of a folder, the window that it is for). Raises SpecError, of the folder's file, for what is not known."""
    try:
        config = Config(folder.config)
        family = family_of(config)
        spec, window = family.decoder(config), family.length(config)
    except SpecError as error:
        raise SpecError(f"{folder.path / CONFIG}: {str(error).removeprefix(f'{CONFIG}: ')}") from None
    if config.unread:
        _log.info("%s: nothing reads %s", folder.path / CONFIG, ", ".join(config.unread))
    return spec, window


def narrow(folder: Folder) -> set[tuple]:
    """Parameters that the folder holds in bfloat16."""
    config = Config(folder.config)
    family, held = family_of(config), folder.tensors
    tensors = family.tensors(family.decoder(config))
    return {part.path for t in tensors if t.name in held and held[t.name].dtype == "BF16" for part in t.parts}


def restore(folder: Folder, target: Any) -> Any:
    """The parameters of a folder in the shapes, dtypes and shardings of `target`, a pure dict of shapes.

    Raises SpecError that names the first tensor which is missing, left over, or of another shape, and the first parameter that
    the folder does not hold; nothing is then read.
    """
    tensors = _checked(folder)
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    wanted = {_path(path): leaf for path, leaf in leaves}
    _check_parameters(folder, tensors, wanted)
    held: dict[tuple, jax.Array] = {}
    for tensor in tensors:
        array = folder.read(tensor.name)
        for part, piece in tensor.taken(array):
            leaf = wanted[part.path]
            whole = held[part.path] if part.path in held else _empty(leaf.shape, leaf.dtype, leaf.sharding)
            held[part.path] = _filled_in(whole, piece, part.period, leaf.sharding, lambda array=array: forget(array))
    return jax.tree_util.tree_unflatten(structure, [held[_path(path)] for path, _ in leaves])


def write(
    model: nnx.Module,
    spec: Decoder,
    window: int,
    target: Path,
    *,
    like: Path | None = None,
    dtype: str,
    ends: Sequence[int] = (),
) -> int:
    """A checkpoint folder of a model in a new folder `target`, which is there as a whole or not at all; the bytes of tensors.

    like: a folder whose tokenizer and generation files are copied, and whose config.json stays where it says the same model.
    dtype: of all tensors. ends: ids that end an answer, said in config.json where no folder has one. Raises SpecError for a
    model that no family can say.
    """
    source = Folder(like) if like is not None and is_folder(like) else None
    family, entries = _said(spec, window, source)
    entries = entries | {"dtype": dtype}
    entries.pop("torch_dtype", None)
    if source is None and ends:
        entries["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    with written_whole(target) as made:
        _write_tensors(made, family.tensors(spec), _numbers(model), NUMBERS[dtype])
        (made / CONFIG).write_text(json.dumps(entries, indent=2) + "\n")
        for name in BESIDE if like is not None else ():
            if (like / name).is_file():
                shutil.copyfile(like / name, made / name)
    return sum(file.stat().st_size for file in target.glob("*.safetensors"))


def _said(spec: Decoder, window: int, source: Folder | None) -> tuple[Family, dict[str, Any]]:
    """The family of a model and its config.json: the source's own where it says the same."""
    if source is None:
        return family_for(spec, window)
    config = Config(source.config)
    family = family_of(config)
    if family.length(config) == window and same_model(family.decoder(config), spec) is None:
        return family, dict(source.config)
    found, entries = family_for(spec, window, family)
    kept = {key: source.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in source.config}
    return found, entries | kept


def _checked(folder: Folder) -> list[Tensor]:
    """The tensors to read. Raises SpecError unless the folder holds these, and nothing else that a model could be made of."""
    config = Config(folder.config)
    family = family_of(config)
    spec = family.decoder(config)
    wanted = {tensor.name: tensor for tensor in family.tensors(spec)}
    there = {name: held for name, held in folder.tensors.items() if not name.endswith(family.ignored)}
    folder.check_numbers(there)
    for name, tensor in wanted.items():
        if name not in there:
            raise SpecError(f"{folder.path}: tensor {name} of shape {tensor.shape} is missing, which {CONFIG} asks for")
        if there[name].shape != tensor.shape:
            raise SpecError(f"{there[name].file}: tensor {name} of shape {there[name].shape}: expected {tensor.shape}")
    surplus = sorted(set(there) - set(wanted))
    if surplus == [HEAD] and spec.head == "tied":
        table = next(name for name, tensor in wanted.items() if tensor.parts[0].path == ("embedding",))
        if np.array_equal(folder.read(HEAD), folder.read(table), equal_nan=True):
            return list(wanted.values())
        raise SpecError(f"{there[HEAD].file}: tensor {HEAD}: expected that of {table}, as tie_word_embeddings says")
    if surplus:
        raise SpecError(f"{there[surplus[0]].file}: tensor {surplus[0]}: nothing of the model that {CONFIG} says")
    return list(wanted.values())


def _check_parameters(folder: Folder, tensors: list[Tensor], wanted: Mapping[tuple, Any]) -> None:
    """Raises SpecError unless the tensors hold the parameters that are wanted."""
    found: dict[tuple, tuple[int, ...]] = {}
    for tensor in tensors:
        for part in tensor.parts:
            layers = () if part.period is None else (max(part.period + 1, found.get(part.path, (0,))[0]),)
            found[part.path] = (*layers, *part.shape(tensor.split))
    for path in sorted(found.keys() | wanted.keys(), key=str):
        asked = tuple(wanted[path].shape) if path in wanted else "absent"
        if found.get(path) != asked:
            name = "/".join(map(str, path))
            raise SpecError(
                f"{folder.path}: parameter {name} is {found.get(path, 'absent')} in the folder, {asked} in the model"
            )


def _path(path: tuple) -> tuple[str | int, ...]:
    return tuple(key.key for key in path)


@functools.cache
def _filled(shape: tuple[int, ...], dtype: Any, sharding: Any):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _empty(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    return _filled(shape, dtype, sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _written(whole: jax.Array, block: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, block, at)


def _filled_in(whole: jax.Array, piece: np.ndarray, period: int | None, sharding: Any, done: Callable[[], None]) -> jax.Array:
    """A parameter with the piece in its place, or in the place of a layer, written in blocks; the old one is consumed."""
    if period is not None:
        piece = piece[None]
    strides = [0 if period is not None and axis == 0 else stride for axis, stride in enumerate(piece.strides)]
    along = int(np.argmax(strides))  # the axis that blocks of the file are cut along
    rows = max(1, BLOCK // max(1, piece.nbytes // max(1, piece.shape[along])))
    for start in range(0, piece.shape[along], rows):
        block = piece[(slice(None),) * along + (slice(start, start + rows),)].astype(whole.dtype)
        at = [start if axis == along else 0 for axis in range(piece.ndim)]
        if period is not None:
            at[0] = period
        block = jax.device_put(np.ascontiguousarray(block), _of_block(sharding, along, period))
        whole = _written(whole, block, tuple(map(jnp.int32, at)))
        done()
    return whole


def _of_block(sharding: Any, along: int, period: int | None) -> Any:
    """A block lies as the parameter does, but that it is whole along the axis that it is cut from, and in its layer."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = list(sharding.spec)
    for axis in {along} | ({0} if period is not None else set()):
        if axis < len(spec):
            spec[axis] = None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


def _numbers(model: nnx.Module) -> dict[tuple, jax.Array]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))}


def _write_tensors(folder: Path, tensors: Iterator[Tensor], numbers: Mapping[tuple, jax.Array], dtype: Any) -> None:
    """Files of about `SHARD` bytes, and their index where there are several. One file is held at a time."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    kept: list[Tensor] = list(tensors)
    size = 0
    for tensor in kept:
        bytes_of = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
        if shards[-1] and size + bytes_of > SHARD:
            shards.append({})
            size = 0
        shards[-1][tensor.name] = tensor.shape
        size += bytes_of
    named = {tensor.name: tensor for tensor in kept}
    places: dict[str, str] = {}
    for n, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
        arrays = {name: _joined(named[name], numbers, dtype) for name in shard}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(int(np.prod(t.shape)) for t in kept) * np.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _joined(tensor: Tensor, numbers: Mapping[tuple, jax.Array], dtype: Any) -> np.ndarray:
    def piece(part: Part) -> np.ndarray:
        array = numbers[part.path]
        return np.asarray(array if part.period is None else array[part.period]).astype(dtype)

    return np.ascontiguousarray(tensor.joined({part.path: piece(part) for part in tensor.parts}))
