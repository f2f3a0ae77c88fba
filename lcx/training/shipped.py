"""Models that come with the package: a run folder with `weights.npz` in place of checkpoints.

`lcx/assets/<name>/` holds config.json and config.txt (the experiment that trained it), weights.npz, metrics.jsonl and
curve.png. Where `run_folder` reads a model, its name serves as the folder.
"""

import shutil
import zipfile
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lcx.spec import SpecError

WEIGHTS = "weights.npz"
STEP = "step"  # beside the parameters: the updates behind them


def names() -> tuple[str, ...]:
    """The models that come with this installation."""
    assets = resources.files("lcx") / "assets"
    return tuple(sorted(child.name for child in assets.iterdir())) if assets.is_dir() else ()


def run_folder(model: str | Path) -> Path:
    """The folder of a trained model: a path, or the name of a shipped model. Raises SpecError if it is neither."""
    if Path(model).is_dir():
        return Path(model)
    if str(model) in names():
        return Path(str(resources.files("lcx") / "assets" / str(model)))
    shipped = f"nor a shipped model ({', '.join(names()) or 'there are none'})"
    raise SpecError(
        f"model {str(model)!r}: no such run folder, {shipped}, nor a checkpoint folder (config.json, *.safetensors)"
    )


def export(model: nnx.Module, step: int, run_dir: Path | str, target: Path | str) -> int:
    """Writes a trained run as a folder to ship; returns the bytes of its weights."""
    run_dir, target = Path(run_dir), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    np.savez_compressed(
        target / WEIGHTS, **{STEP: np.asarray(step)}, **{_name(path): np.asarray(leaf) for path, leaf in leaves}
    )
    for name in ("config.json", "config.txt", "metrics.jsonl"):
        shutil.copyfile(run_dir / name, target / name)
    return (target / WEIGHTS).stat().st_size


def step(folder: Path) -> int | None:
    """The updates behind a shipped folder's weights; None if the folder ships none."""
    if not (folder / WEIGHTS).is_file():
        return None
    return int(_read(folder, [STEP])[STEP])


def restore(folder: Path, target: Any) -> Any:
    """The weights of a shipped folder in the shapes and shardings of `target`, a pure dict of shapes.

    Raises SpecError if it holds other parameters.
    """
    arrays = _read(folder)
    del arrays[STEP]
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    shapes = {_name(path): tuple(leaf.shape) for path, leaf in leaves}
    found = {name: array.shape for name, array in arrays.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            sides = found.get(name, "absent"), shapes.get(name, "absent")
            raise SpecError(f"{folder / WEIGHTS}: parameter {name} is {sides[0]} in the file, {sides[1]} in the model")
    placed = [jax.device_put(arrays[_name(path)].astype(leaf.dtype), leaf.sharding) for path, leaf in leaves]
    return jax.tree_util.tree_unflatten(structure, placed)


def _read(folder: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Some arrays of the weights, or all. Raises SpecError if the file is damaged."""
    try:
        with np.load(folder / WEIGHTS) as held:
            return {name: held[name] for name in (held if names is None else names)}
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise SpecError(f"{folder / WEIGHTS}: cannot be read ({type(error).__name__}: {error}); write it again") from error


def _name(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)
