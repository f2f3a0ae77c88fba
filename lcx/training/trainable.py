"""Which parameters a training changes: the rest of the model is frozen, has no gradient and no optimizer state.

Parameters are named by their paths in the model, `slots/0/mixer/query` for one; a pattern names all that it matches as file
names are matched (`*` for any text, `/` included).
"""

import fnmatch
from collections.abc import Collection, Sequence
from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lcx.spec import SpecError

Path = tuple[Any, ...]


def added_paths(state: nnx.State) -> frozenset[Path]:
    """Of the parameters that a method adds to a trained model (`nnx.Param(..., added=True)`): where that has none, they begin
    as they are built."""
    return frozenset(path for path, leaf in nnx.to_flat_state(state) if leaf.get_metadata().get("added"))


def trained_paths(state: nnx.State, patterns: Sequence[str] | None) -> frozenset[Path]:
    """Of the parameters that are trained; None is all. Raises SpecError for a pattern that matches none."""
    names = {path: "/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    if patterns is None:
        return frozenset(names)
    if not patterns:
        raise SpecError("Experiment.trainable = (): expected at least one pattern, or None for all parameters")
    for pattern in patterns:
        if not fnmatch.filter(names.values(), pattern):
            accepted = f"expected patterns of {', '.join(names.values())}"
            raise SpecError(f"Experiment.trainable: {pattern!r} matches no parameter: {accepted}")
    return frozenset(path for path, name in names.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def trained_state(state: nnx.State, paths: Collection[Path]) -> nnx.State:
    """The part of a model's state that is trained."""
    return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(state) if path in paths])


def parted(params: Any, paths: Collection[Path]) -> tuple[Any, Any]:
    """(trained, frozen) of a pure dict of parameters."""
    flat = flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if path in paths}
    return unflatten_dict(trained), unflatten_dict({path: leaf for path, leaf in flat.items() if path not in paths})


def joined(trained: Any, frozen: Any) -> Any:
    """The pure dict of the two."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))
