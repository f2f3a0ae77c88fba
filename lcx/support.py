"""What combines with what: the one validator of whole configs, as a table of rules.

Specs check themselves; what depends on several of them is checked here, before devices are touched and anything is compiled.
A rule yields one sentence for each place where a config breaks it: the field by its path, the value, what is accepted.
"""

import re
from collections.abc import Iterator, Mapping

from jax.sharding import AbstractMesh

from lcx.attention.attend import KERNELS
from lcx.attention.mask import Hide
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import TaskDoesNotFit
from lcx.data.sources import Source, SourceError, StandardLibrary
from lcx.inference.serving import Serving
from lcx.memory.hmt import HMT
from lcx.parallel.mesh import AXES
from lcx.spec import SpecError, below
from lcx.support_rules.caches import (
    caches_are_of_plain_attention,
    caches_fit_their_layers,
    caches_meet_their_queries,
    caches_turn_keys,
    clusters_are_of_what_is_seen,
    pages_are_of_one_device,
    prompts_are_read_twice,
    rings_hold_what_is_seen,
)
from lcx.support_rules.memories import (
    beacons_are_read_by_attention,
    chunks_are_learned_in_turn,
    documents_have_room,
    places_are_positions,
    prompts_are_seen_through_gists,
    segments_are_drawn_of_a_memory,
    segments_are_texts,
    texts_are_told_back_by_an_encoder,
)
from lcx.support_rules.mesh import (
    activations_lie_on_the_mesh,
    chunks_are_chosen_from_whole_rows,
    mesh_is_used,
    order_is_kept,
    parameters_divide,
    queries_find_their_keys,
    queries_meet_keys,
    rows_divide,
    sequence_divides,
    vocabulary_divides,
)
from lcx.support_rules.positions import (
    axes_are_turned,
    fractions_are_held,
    heads_rotate,
    keys_are_turned_anew,
    lengths_are_those_of_documents,
    one_length_policy,
    positions_are_exact,
    positions_are_given_once,
    positions_are_read,
    positions_are_the_ropes,
    query_scales_act,
    regions_turn_by_a_static_rope,
    rope_is_read,
    shared_tokens_are_seen,
    table_holds_rows,
)
from lcx.support_rules.walk import OnMesh, Rule, attentions, sequence_axes, sizes
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.placement import parameter_shardings
from lcx.training.schedules import Constant
from lcx.training.step import abstract_model
from lcx.training.trainable import trained_paths
from pallas_kernels.target import platform


def validate(experiment: Experiment, device_count: int | None = None) -> None:
    """Raises SpecError with the first broken rule. With `device_count`, devices and data must be there too."""
    for sentence in broken(experiment):
        raise SpecError(sentence)
    check_devices(experiment, device_count)
    mesh = AbstractMesh(tuple(sizes(experiment.mesh).values()), AXES)
    parameter_shardings(abstract_model(experiment.model)[1], experiment.model.rules, mesh)
    for path, part in below(experiment.data, "data"):
        if isinstance(part, Source) and device_count is not None:
            try:
                part.documents()
            except SourceError as error:
                raise SpecError(f"{path}: {error}") from None


def validate_serving(serving: Serving) -> None:
    """Raises SpecError with the first broken rule: those of a model on a mesh that reads plain rows, and its own."""
    for axis, size in sequence_axes(serving).items():
        raise SpecError(f"mesh.{axis} = {size}: expected 1, as the tokens of an answer come one at a time")
    rows = PackedText(source=StandardLibrary(), most=1)
    data = Pipeline(mixture=(Weighted(rows=rows),), length=serving.length, batch_size=serving.rows)
    optimizer = AdamW(learning_rate=Constant(peak=1.0))
    read = Experiment(model=serving.model, data=data, optimizer=optimizer, steps=1, mesh=serving.mesh)
    names = {"data.length": "length", "data.batch_size": "rows"}
    for sentence in (sentence for rule in RULES.values() if rule not in _OF_TRAINING for sentence in rule(read)):
        raise SpecError(re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], sentence))
    if isinstance(serving.model.memory, HMT) and serving.model.memory.query == "ahead":
        raise SpecError("model.memory.query = 'ahead': expected 'behind', as tokens of an answer are not known ahead of it")
    for path, mixer in attentions(serving):
        split = [axis for axis in serving.model.rules.slots if sizes(serving.mesh)[axis] > 1]
        if mixer.distances is not None and mixer.distances.chooses and split:
            raise SpecError(
                f"{path}.distances = {mixer.distances}: expected one that chooses no channels beside mesh.{split[0]}"
            )
        policy = getattr(mixer.cache, "policy", None)
        if policy is not None and policy.rereads:
            raise SpecError(f"{path}.cache.policy: expected one that reads prompts once, which is what a plan counts")
        if mixer.distances is not None and mixer.distances.reads_queries and serving.mesh.size > 1:
            raise SpecError(f"{path}.distances = {mixer.distances}: expected one that chooses by distance on several devices")
    mesh = AbstractMesh(tuple(sizes(serving.mesh).values()), AXES)
    parameter_shardings(abstract_model(serving.model)[1], serving.model.rules, mesh)


def broken(experiment: Experiment) -> Iterator[str]:
    """Every sentence of every rule; nothing if the parts combine."""
    for rule in RULES.values():
        yield from rule(experiment)


def check_devices(experiment: OnMesh, count: int | None) -> None:
    """Raises SpecError if the mesh has more devices than there are, or a part wants those of another platform."""
    if count is not None and experiment.mesh.size > count:
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes(experiment.mesh).items() if size > 1)
        hint = "; on a CPU JAX_NUM_CPU_DEVICES sets how many there are" if count == 1 else ""
        raise SpecError(f"mesh = {shape} = {experiment.mesh.size} devices: expected at most the {count} there are{hint}")
    if count is not None:
        check_backends(experiment, platform())


def check_backends(experiment: OnMesh, platform: str) -> None:
    """Raises SpecError if a part names an attention kernel of another platform."""
    for path, mixer in attentions(experiment):
        if mixer.backend in KERNELS and mixer.backend != platform:
            raise SpecError(f"{path}.backend = {mixer.backend!r}: expected 'auto', 'xla' or 'reference' on {platform}")


def _vocabulary_holds_tokens(experiment: Experiment) -> Iterator[str]:
    size = experiment.data.tokenizer.size
    if experiment.model.vocab < size:
        yield f"model.vocab = {experiment.model.vocab}: expected at least the {size} ids of data.tokenizer"


def _trained_parameters_are_there(experiment: Experiment) -> Iterator[str]:
    if experiment.trainable is not None:
        try:
            trained_paths(abstract_model(experiment.model)[1], experiment.trainable)
        except SpecError as error:
            yield str(error)


def _rows_fit(experiment: Experiment) -> Iterator[str]:
    data = experiment.data
    for i, kind in enumerate(data.mixture):
        try:
            kind.rows.check_fit(data.tokenizer, data.length)
        except (SpecError, TaskDoesNotFit) as error:
            yield f"data.mixture[{i}].rows does not fit data.length: {error}"


def _roles_exist(experiment: Experiment) -> Iterator[str]:
    for path, part in below(experiment.model, "model"):
        if isinstance(part, Hide):
            yield f"{path} = {part}: hides roles, but no part of this config gives its tokens one"


RULES: Mapping[str, Rule] = {
    "every sharded parameter axis is a multiple of the mesh axes that shard it": parameters_divide,
    "key heads lie on the mesh as their query heads do, or every device has them": queries_find_their_keys,
    "an activation's channels lie on other mesh axes than its tokens": activations_lie_on_the_mesh,
    "the row length is a multiple of the mesh axes that shard the sequence, times the layout's parts": sequence_divides,
    "parts that read neighbours get rows in their order": order_is_kept,
    "heads can be shared out where the communication exchanges them": queries_meet_keys,
    "the batch is a multiple of the mesh axes that shard it, times accumulation": rows_divide,
    "every mesh axis shards something": mesh_is_used,
    "the vocabulary holds every id of the tokenizer": _vocabulary_holds_tokens,
    "the vocabulary divides into the parts that the head is applied in": vocabulary_divides,
    "positions are integers that float32 holds": positions_are_exact,
    "fractions of a position are not lost in float32": fractions_are_held,
    "a table of positions has a row for every place": table_holds_rows,
    "positions are read by some layer": positions_are_read,
    "a rope that goes by the length of documents gets no skipped positions": lengths_are_those_of_documents,
    "positions come from the rows or from a rule": positions_are_given_once,
    "positions have as many axes as the rope turns by": axes_are_turned,
    "a token that all documents see is seen by every layer": shared_tokens_are_seen,
    "a row holds no more documents than the model makes room for": documents_have_room,
    "a model that reads by segments gets whole rows of plain text": segments_are_texts,
    "beacons are keys of plain attention": beacons_are_read_by_attention,
    "lengths of segments are drawn from a shortest to the longest": segments_are_drawn_of_a_memory,
    "a text is told back from what an encoder made of it": texts_are_told_back_by_an_encoder,
    "a prompt is seen through its gists alone": prompts_are_seen_through_gists,
    "a model that trains itself while it reads sees a window, and gets whole rows": chunks_are_learned_in_turn,
    "a mixer that reads places by their index gets no other positions": places_are_positions,
    "what is to be trained is there": _trained_parameters_are_there,
    "every head has channels that its rope can rotate": heads_rotate,
    "the model's rope is read by some layer": rope_is_read,
    "a rope that depends on the length finds raw keys in the cache": keys_are_turned_anew,
    "a distance plan turns by a rope of one axis that no length changes": regions_turn_by_a_static_rope,
    "a plan that chooses chunks finds all keys of a row": chunks_are_chosen_from_whole_rows,
    "a cache that is no dense one is that of plain attention": caches_are_of_plain_attention,
    "what a cache's policy reads of queries and logits is defined": caches_meet_their_queries,
    "a ring holds all that its layer sees": rings_hold_what_is_seen,
    "rows that draw on a pool of pages are those of one device": pages_are_of_one_device,
    "prompts that are read twice are seen whole from behind": prompts_are_read_twice,
    "a cache turns keys by a rope that it knows": caches_turn_keys,
    "clusters are of keys that are seen alike": clusters_are_of_what_is_seen,
    "a cache has the tables and the layers that it counts on": caches_fit_their_layers,
    "a query scale acts in some layer": query_scales_act,
    "positions of a learned rope meet that rope": positions_are_the_ropes,
    "ropes that depend on the length agree whether it is frozen or growing": one_length_policy,
    "a row is long enough for the recall sequences that fill it": _rows_fit,
    "a mask hides only roles that tokens have": _roles_exist,
}


_OF_TRAINING = (_vocabulary_holds_tokens, segments_are_drawn_of_a_memory)  # what a model in use may do without
