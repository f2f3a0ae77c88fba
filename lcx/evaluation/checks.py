"""What is refused before anything is trained, measured or written: one set of checks for evaluations and ablations."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lcx.config import assign, build, of_spec
from lcx.config_text import first_difference
from lcx.data.tokenizers import Tokenizer
from lcx.evaluation.tasks.task import Task
from lcx.spec import Spec, SpecError, edits
from lcx.support_rules.walk import reads_rope
from lcx.training.experiment import Experiment
from lcx.training.run_folder import read_trained
from lcx.training.step import abstract_model

Edits = tuple[tuple[str, Any], ...]  # (path, value) pairs, applied in order


def check_names(spec: Spec, field: str, names: Sequence[str], *, files: bool = True) -> None:
    """Raises SpecError for `field` unless its parts have distinct names, at least one; with `files`, names for files."""
    spec.check(len(names) >= 1 and len(set(names)) == len(names), field, f"distinct names, at least one; got {names}")
    fit = not files or all(re.fullmatch(r"\w[\w .,+=-]*", name) for name in names)
    spec.check(fit, field, f"names that can be files: letters, digits, blanks and . , + = - ; got {names}")


def check_lengths(spec: Spec, lengths: Sequence[int]) -> None:
    """Raises SpecError for the field `lengths` unless each can be measured at, and once."""
    distinct = len(set(lengths)) == len(lengths) >= 1
    spec.check(distinct and min(lengths) >= 1, "lengths", "distinct lengths of at least 1 token, at least one")


def check_inputs(jobs: Iterable[tuple[Tokenizer, Task, int]]) -> None:
    """Raises a task's own error where it, or its source, does not fit a length."""
    for tokenizer, task, length in dict.fromkeys(jobs):
        task.inputs(tokenizer, length)


def trained_experiment(model: str) -> Experiment:
    """The experiment of a run folder or a shipped model. Raises SpecError if there is none."""
    found = read_trained(model)
    if not isinstance(found, Experiment):
        kind = type(found).__name__
        raise SpecError(f"model {model!r}: expected the folder of a training run; its config is of type {kind}")
    return found


def edited(experiment: Experiment, changes: Edits) -> Experiment:
    """`lcx.spec.edits`. Raises SpecError if an edit is impossible, or is of a `model.rope` that no layer reads."""
    try:
        changed = edits(experiment, changes)
    except SpecError:
        tree = functools.reduce(lambda tree, one: assign(tree, one[0], of_spec(one[1])), changes, of_spec(experiment))
        build(tree)  # which says more: the path, and what else would be taken
        raise
    if any(re.match(r"model\.rope\b", path) for path, _ in changes) and not reads_rope(changed.model):
        raise SpecError('an edit of model.rope changes nothing: expected a layer with rope = "model"; edit the layers\' own')
    return changed


def used(trained: Experiment, changes: Edits, field: str) -> Experiment:
    """A trained experiment edited in what measuring reads: its model and tokenizer.

    Raises SpecError as `edited`, and if `field`, which holds the edits, changes anything else.
    """
    changed = edited(trained, changes)
    data = dataclasses.replace(changed.data, tokenizer=trained.data.tokenizer)
    if other := first_difference(dataclasses.replace(changed, model=trained.model, data=data), trained):
        raise SpecError(f"{field} change {other}: expected edits of the model or data.tokenizer, since nothing else is read")
    return changed


def check_parameters(trained: Experiment, changed: Experiment, field: str) -> None:
    """Raises SpecError if the edits of `field` need parameters that the trained model has not, or has in other shapes."""
    shapes = [
        {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(abstract_model(one.model)[1])}
        for one in (trained, changed)
    ]
    held, wanted = shapes
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            sides = f"{wanted.get(name, 'none')}, the trained model has {held.get(name, 'none')}"
            raise SpecError(f"{field}: parameter {name} of shape {sides}: expected edits that keep its parameters")


def digest(model: nnx.Module) -> str:
    """Sixteen hex digits that identify the parameters: their names, types, shapes and values."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]
