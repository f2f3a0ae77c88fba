"""What rules of whole configs walk over: the mesh, the attention layers, the rows that have positions of their own."""

import math
from collections.abc import Callable, Iterator, Mapping

from lcx.data.continuous import Continuous
from lcx.data.rows import Joined, Rows
from lcx.inference.serving import Serving
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.parallel.mesh import AXES, MeshSpec
from lcx.spec import below
from lcx.training.experiment import Experiment

Rule = Callable[[Experiment], Iterator[str]]
OnMesh = Experiment | Serving


def sizes(mesh: MeshSpec) -> dict[str, int]:
    return {axis: getattr(mesh, axis) for axis in AXES}


def sequence_axes(experiment: OnMesh) -> dict[str, int]:
    """The mesh axes of more than one device that share a row, with their sizes, outermost first."""
    return {axis: size for axis in experiment.model.rules.sequence if (size := sizes(experiment.mesh)[axis]) > 1}


def reads_rope(model: Decoder) -> bool:
    """Whether some part of the model takes the model's rope."""
    return any(getattr(part, "rope", None) == "model" for _, part in below(model, "model"))


def attentions(experiment: OnMesh) -> Iterator[tuple[str, Attention]]:
    for path, part in below(experiment.model, "model"):
        if isinstance(part, Attention):
            yield path, part


def placed_rows(experiment: Experiment) -> Iterator[tuple[str, Rows]]:
    """Kinds of rows that have positions of their own, by path; not those that only hold others."""
    for path, part in below(experiment.data, "data"):
        if isinstance(part, Rows) and part.position_axes is not None and not isinstance(part, Joined):
            yield path, part


def moved_rows(experiment: Experiment) -> list[str]:
    """Names of those in which a step in the text is not a step of one."""
    return [f"{path} = {type(part).__name__}" for path, part in placed_rows(experiment) if not isinstance(part, Continuous)]


def divides(
    experiment: Experiment, path: str, value: int, axes: tuple[str, ...], times: Mapping[str, int] | None = None
) -> Iterator[str]:
    factors = {f"mesh.{axis}": getattr(experiment.mesh, axis) for axis in axes} | dict(times or {})
    need = math.prod(factors.values())
    if value % need:
        shown = " * ".join(f"{name} {size}" for name, size in factors.items() if size > 1)
        yield f"{path} = {value}: expected a multiple of {need} ({shown})"
