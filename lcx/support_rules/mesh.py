"""Rules of whole configs: what lies on a mesh divides over it, and what has to meet does."""

import math
from collections.abc import Iterator

from lcx.config_text import fields
from lcx.parallel.mesh import AXES
from lcx.spec import below
from lcx.support_rules.walk import attentions, divides, sequence_axes, sizes
from lcx.training.experiment import Experiment

_PARAMETER_AXES = ("width", "heads", "kv_heads", "hidden", "vocab")


def parameters_divide(experiment: Experiment) -> Iterator[str]:
    for path, value in fields(experiment.model, "model"):
        axis = path.rpartition(".")[2]
        if axis in _PARAMETER_AXES and isinstance(value, int):
            yield from divides(experiment, path, value, getattr(experiment.model.rules, axis))


def queries_find_their_keys(experiment: Experiment) -> Iterator[str]:
    rules, mesh = experiment.model.rules, sizes(experiment.mesh)
    split = lambda axes: [axis for axis in axes if mesh[axis] > 1]
    queries, keys = split(rules.heads), split(rules.kv_heads)
    for path, mixer in attentions(experiment) if queries != keys else ():
        if keys:
            yield f"model.rules.kv_heads = {rules.kv_heads}: expected the axes of model.rules.heads, {rules.heads}, or none"
            continue
        group, own = mixer.heads // mixer.kv_heads, mixer.heads // math.prod(mesh[axis] for axis in queries)
        if own and group % own and own % group:
            yield (
                f"{path}.kv_heads = {mixer.kv_heads}: expected the {own} query heads of a device to be part of one key head's "
                f"{group}, or a multiple of them"
            )


def activations_lie_on_the_mesh(experiment: Experiment) -> Iterator[str]:
    rules = experiment.model.rules
    for name in ("heads", "kv_heads", "hidden", "vocab"):
        if taken := set(getattr(rules, name)) & {*rules.batch, *rules.sequence}:
            axis = next(axis for axis in AXES if axis in taken)
            if sizes(experiment.mesh)[axis] > 1:
                expected = f"expected axes apart from those of batch and sequence ({axis})"
                yield f"model.rules.{name} = {getattr(rules, name)}: {expected}"


def sequence_divides(experiment: Experiment) -> Iterator[str]:
    shards = math.prod(sequence_axes(experiment).values())
    factors = {"layout": experiment.layout.parts(shards) // shards}
    yield from divides(experiment, "data.length", experiment.data.length, experiment.model.rules.sequence, factors)


def order_is_kept(experiment: Experiment) -> Iterator[str]:
    if experiment.layout.keeps_order or not sequence_axes(experiment):
        return
    for path, part in below(experiment.model, "model"):
        if getattr(part, "sequential", False):
            yield f"layout = {experiment.layout}: expected Contiguous(), as {path} reads neighbours"


def queries_meet_keys(experiment: Experiment) -> Iterator[str]:
    model, axes = experiment.model, sequence_axes(experiment)
    split = math.prod(sizes(experiment.mesh)[axis] for axis in model.rules.heads)
    for path, mixer in attentions(experiment) if axes else ():
        heads, group = max(1, mixer.heads // split), mixer.heads // mixer.kv_heads
        if reason := model.communication.refusal(axes, heads, max(1, heads // group)):
            yield f"model.communication = {type(model.communication).__name__}(): {reason} ({path})"


def rows_divide(experiment: Experiment) -> Iterator[str]:
    axes, parts = experiment.model.rules.batch, experiment.accumulation
    yield from divides(experiment, "data.batch_size", experiment.data.batch_size, axes, {"accumulation": parts})


def mesh_is_used(experiment: Experiment) -> Iterator[str]:
    rules = experiment.model.rules
    used = {axis for _, axes in fields(rules) if isinstance(axes, tuple) for axis in axes}
    for axis, size in sizes(experiment.mesh).items():
        if size > 1 and axis not in used:
            yield f"mesh.{axis} = {size}: expected 1, since model.rules give the axis nothing to shard"


def vocabulary_divides(experiment: Experiment) -> Iterator[str]:
    if (parts := getattr(experiment.objective, "parts", 1)) > 1:
        factors = {"objective.parts": parts}
        yield from divides(experiment, "model.vocab", experiment.model.vocab, experiment.model.rules.vocab, factors)


def chunks_are_chosen_from_whole_rows(experiment: Experiment) -> Iterator[str]:
    for path, mixer in attentions(experiment):
        if mixer.distances is None or not mixer.distances.reads_queries:
            continue
        kind, communication = type(mixer.distances).__name__, experiment.model.communication
        if sequence_axes(experiment) and not communication.whole_rows:
            expected = f"expected AllGather() or Ulysses(), as {path}.distances = {kind} chooses among all keys of a row"
            yield f"model.communication = {type(communication).__name__}(): {expected}"
