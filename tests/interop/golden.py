"""The golden checkpoint folders of `tests/oracles/hf_checkpoints.py`, as models."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lcx.interop import hf
from lcx.interop.folder import Folder
from lcx.training.placement import parameter_shardings
from lcx.training.step import abstract_model, bind

GOLDEN = Path(__file__).parents[1] / "oracles" / "golden" / "hf"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())


def loaded(path, mesh, spec=None):
    """(spec, model) of a folder on a mesh."""
    folder = Folder(path)
    spec = hf.read_decoder(folder)[0] if spec is None else spec
    graph, state = abstract_model(spec)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    target = jax.tree.map(place, nnx.to_pure_dict(state), parameter_shardings(state, spec.rules, mesh))
    return spec, bind(graph, state, hf.restore(folder, target))


def answers(name):
    with np.load(GOLDEN / name / "answers.npz") as held:
        return dict(held)
