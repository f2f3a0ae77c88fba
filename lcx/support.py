"""What combines with what: the one validator of whole configs, as a table of rules.

Specs check themselves; what depends on several of them is checked here, before devices are touched and anything is compiled.
A rule yields one sentence for each place where a config breaks it: the field by its path, the value, what is accepted.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jax.sharding import AbstractMesh

from lcx.attention.attend import KERNELS
from lcx.attention.mask import Hide
from lcx.batch import EXACT_POSITIONS
from lcx.config_text import fields
from lcx.data.continuous import Continuous
from lcx.data.glossary import Glossary
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import TaskDoesNotFit
from lcx.data.rows import Joined, Rows
from lcx.data.skipped import Skipped
from lcx.data.sources import Source, SourceError, StandardLibrary
from lcx.inference.serving import Serving
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.gist import Gist
from lcx.memory.segment_memory import SegmentMemory
from lcx.memory.ttt_e2e import TTTE2E
from lcx.mixers.attention import Attention
from lcx.mixers.beacon_attention import PLAIN
from lcx.mixers.mixer import Mixer
from lcx.mixers.titans_mac import TitansMAC
from lcx.models.decoder import Decoder
from lcx.models.ttt_e2e_fit import unfit
from lcx.objectives.autoencoding import Autoencoding
from lcx.objectives.beacon_modeling import BeaconModeling
from lcx.objectives.random_segments import RandomSegments
from lcx.parallel.mesh import AXES, MeshSpec
from lcx.positions.clex import CLEX
from lcx.positions.clex_positions import CLEXPositions
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import LengthRule, length_policy
from lcx.positions.longrope import LongRoPE
from lcx.positions.position_rule import RandomSteps
from lcx.positions.rope import Rope
from lcx.spec import SpecError, below
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.placement import parameter_shardings
from lcx.training.schedules import Constant
from lcx.training.step import abstract_model
from lcx.training.trainable import trained_paths
from pallas_kernels.target import platform

_PARAMETER_AXES = ("width", "heads", "kv_heads", "hidden", "vocab")

Rule = Callable[[Experiment], Iterator[str]]
OnMesh = Experiment | Serving


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
    for path, mixer in _attentions(serving):
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
    for path, mixer in _attentions(experiment):
        if mixer.backend in KERNELS and mixer.backend != platform:
            raise SpecError(f"{path}.backend = {mixer.backend!r}: expected 'auto', 'xla' or 'reference' on {platform}")


def reads_rope(model: Decoder) -> bool:
    """Whether some part of the model takes the model's rope."""
    return any(getattr(part, "rope", None) == "model" for _, part in below(model, "model"))


def sequence_axes(experiment: OnMesh) -> dict[str, int]:
    """The mesh axes of more than one device that share a row, with their sizes, outermost first."""
    return {axis: size for axis in experiment.model.rules.sequence if (size := sizes(experiment.mesh)[axis]) > 1}


def sizes(mesh: MeshSpec) -> dict[str, int]:
    return {axis: getattr(mesh, axis) for axis in AXES}


def _parameters_divide(experiment: Experiment) -> Iterator[str]:
    for path, value in fields(experiment.model, "model"):
        axis = path.rpartition(".")[2]
        if axis in _PARAMETER_AXES and isinstance(value, int):
            yield from _divides(experiment, path, value, getattr(experiment.model.rules, axis))


def _queries_find_their_keys(experiment: Experiment) -> Iterator[str]:
    rules, mesh = experiment.model.rules, sizes(experiment.mesh)
    split = lambda axes: [axis for axis in axes if mesh[axis] > 1]
    queries, keys = split(rules.heads), split(rules.kv_heads)
    for path, mixer in _attentions(experiment) if queries != keys else ():
        if keys:
            yield f"model.rules.kv_heads = {rules.kv_heads}: expected the axes of model.rules.heads, {rules.heads}, or none"
            continue
        group, own = mixer.heads // mixer.kv_heads, mixer.heads // math.prod(mesh[axis] for axis in queries)
        if own and group % own and own % group:
            yield (
                f"{path}.kv_heads = {mixer.kv_heads}: expected the {own} query heads of a device to be part of one key head's "
                f"{group}, or a multiple of them"
            )


def _activations_lie_on_the_mesh(experiment: Experiment) -> Iterator[str]:
    rules = experiment.model.rules
    for name in ("heads", "kv_heads", "hidden", "vocab"):
        if taken := set(getattr(rules, name)) & {*rules.batch, *rules.sequence}:
            axis = next(axis for axis in AXES if axis in taken)
            if sizes(experiment.mesh)[axis] > 1:
                expected = f"expected axes apart from those of batch and sequence ({axis})"
                yield f"model.rules.{name} = {getattr(rules, name)}: {expected}"


def _sequence_divides(experiment: Experiment) -> Iterator[str]:
    shards = math.prod(sequence_axes(experiment).values())
    factors = {"layout": experiment.layout.parts(shards) // shards}
    yield from _divides(experiment, "data.length", experiment.data.length, experiment.model.rules.sequence, factors)


def _order_is_kept(experiment: Experiment) -> Iterator[str]:
    if experiment.layout.keeps_order or not sequence_axes(experiment):
        return
    for path, part in below(experiment.model, "model"):
        if getattr(part, "sequential", False):
            yield f"layout = {experiment.layout}: expected Contiguous(), as {path} reads neighbours"


def _queries_meet_keys(experiment: Experiment) -> Iterator[str]:
    model, axes = experiment.model, sequence_axes(experiment)
    split = math.prod(sizes(experiment.mesh)[axis] for axis in model.rules.heads)
    for path, mixer in _attentions(experiment) if axes else ():
        heads, group = max(1, mixer.heads // split), mixer.heads // mixer.kv_heads
        if reason := model.communication.refusal(axes, heads, max(1, heads // group)):
            yield f"model.communication = {type(model.communication).__name__}(): {reason} ({path})"


def _rows_divide(experiment: Experiment) -> Iterator[str]:
    axes, parts = experiment.model.rules.batch, experiment.accumulation
    yield from _divides(experiment, "data.batch_size", experiment.data.batch_size, axes, {"accumulation": parts})


def _mesh_is_used(experiment: Experiment) -> Iterator[str]:
    rules = experiment.model.rules
    used = {axis for _, axes in fields(rules) if isinstance(axes, tuple) for axis in axes}
    for axis, size in sizes(experiment.mesh).items():
        if size > 1 and axis not in used:
            yield f"mesh.{axis} = {size}: expected 1, since model.rules give the axis nothing to shard"


def _vocabulary_holds_tokens(experiment: Experiment) -> Iterator[str]:
    size = experiment.data.tokenizer.size
    if experiment.model.vocab < size:
        yield f"model.vocab = {experiment.model.vocab}: expected at least the {size} ids of data.tokenizer"


def _vocabulary_divides(experiment: Experiment) -> Iterator[str]:
    if (parts := getattr(experiment.objective, "parts", 1)) > 1:
        factors = {"objective.parts": parts}
        yield from _divides(experiment, "model.vocab", experiment.model.vocab, experiment.model.rules.vocab, factors)


def _positions_are_exact(experiment: Experiment) -> Iterator[str]:
    data = experiment.data
    if data.length > EXACT_POSITIONS:
        yield f"data.length = {data.length}: expected at most 2^24 = {EXACT_POSITIONS}, where positions are exact"
    if data.positions is not None and data.positions.bound(0) > EXACT_POSITIONS:
        yield f"data.positions = {data.positions}: expected a target of at most 2^24 = {EXACT_POSITIONS}"
    if data.positions is not None and data.positions.reach is not None and data.positions.reach < data.length:
        yield f"data.positions = {data.positions}: expected a target of at least data.length = {data.length}"


def _fractions_are_held(experiment: Experiment) -> Iterator[str]:
    data, rule = experiment.data, experiment.data.positions
    step = None if rule is None else rule.step(data.length)
    if step is None:
        return
    largest = rule.bound(data.length)
    spacing = float(np.spacing(np.float32(largest - 1)))
    if spacing > step:
        yield (
            f"data.positions = {rule}: steps of {step:.3g} at positions as large as {largest}, where those of float32 are "
            f"{spacing:.3g}: expected a smaller reach or larger steps"
        )


def _table_holds_rows(experiment: Experiment) -> Iterator[str]:
    table, length = experiment.model.position_table, max(experiment.data.length, _reach(experiment))
    if table is None:
        return
    if isinstance(memory := experiment.model.memory, SegmentMemory):
        length = max(memory.segment + memory.around, memory.asks)
    given = experiment.data.positions
    if table.reads_lengths and given is not None and not given.tells_length:
        yield f"data.positions = {given}: expected None or a rule that tells a length, which model.position_table reads"
    for path, rows in _placed_rows(experiment):
        if table.reads_lengths or not isinstance(rows, Continuous | Skipped):
            yield f"{path} = {type(rows).__name__}: expected rows whose positions are the index beside model.position_table"
    if table.reach is not None and table.reach < length:
        yield f"data: positions up to {length}: expected at most the {table.reach} places that model.position_table reads"


def _positions_are_read(experiment: Experiment) -> Iterator[str]:
    model, given = experiment.model, experiment.data.positions
    reads = model.position_table is not None or any(model.rope_of(mixer) is not None for _, mixer in _attentions(experiment))
    for name in ([f"data.positions = {given}"] if given is not None else []) + _moved_rows(experiment):
        if not reads:
            yield f"{name}: expected none of it, as no layer of this model has a rope, which reads positions"
        elif model.position_table is not None and given is not None and given.step(experiment.data.length) != 1.0:
            yield f"{name}: expected whole numbers beside model.position_table, which has a row for each"


def _placed_rows(experiment: Experiment) -> Iterator[tuple[str, Rows]]:
    """Kinds of rows that have positions of their own, by path; not those that only hold others."""
    for path, part in below(experiment.data, "data"):
        if isinstance(part, Rows) and part.position_axes is not None and not isinstance(part, Joined):
            yield path, part


def _moved_rows(experiment: Experiment) -> list[str]:
    """Names of those in which a step in the text is not a step of one."""
    return [f"{path} = {type(part).__name__}" for path, part in _placed_rows(experiment) if not isinstance(part, Continuous)]


def _axes_are_turned(experiment: Experiment) -> Iterator[str]:
    for path, rows in _placed_rows(experiment) if experiment.data.position_axes > 1 else ():
        for where, mixer in _attentions(experiment):
            rule = experiment.model.rope_of(mixer)
            turned = max(1, len(rule.sections)) if isinstance(rule, FrequencyRule) else 1
            if rule is not None and rows.position_axes not in (1, turned):
                axes = f"{path} = {type(rows).__name__} of {rows.position_axes} position axes"
                yield f"{axes}: expected {turned}, which the rope of {where} turns by"


def _shared_tokens_are_seen(experiment: Experiment) -> Iterator[str]:
    anchors = [path for path, part in _placed_rows(experiment) if part.shares]
    for path, part in below(experiment.model, "model") if anchors else ():
        if getattr(part, "recurrent", False):
            begins = f"{path}, a {type(part).__name__}, begins each document with an empty state"
            yield f"{anchors[0]}.sees = 'anchor': expected another, as {begins}"


def _documents_have_room(experiment: Experiment) -> Iterator[str]:
    room, length = experiment.model.documents, experiment.data.length
    chunked = [(path, part) for path, part in below(experiment.model, "model") if getattr(part, "chunked", False)]
    for i, kind in enumerate(experiment.data.mixture if chunked else ()):
        most, (path, part) = kind.rows.documents(length), chunked[0]
        if most > room:
            kind_of = f"{path}, a {type(part).__name__}, has to hold them all"
            why = f"documents that data.mixture[{i}].rows may put into a row: {kind_of}"
            hint = f"; data.mixture[{i}].rows.most can limit them" if getattr(kind.rows, "most", 0) is None else ""
            yield f"model.documents = {room}: expected at least the {most} {why}{hint}"


def _places_are_positions(experiment: Experiment) -> Iterator[str]:
    for path, part in below(experiment.model, "model"):
        if not (isinstance(part, Mixer) and part.by_index):
            continue
        reads = f"as {path}, a {type(part).__name__}, reads places by their index"
        if isinstance(part, TitansMAC) and isinstance(experiment.model.rope_of(part.attention), LengthRule):
            yield f"{path}.attention turns by a rope of a document's length: expected one that no length changes, {reads}"
        given = [f"data.positions = {experiment.data.positions}"] if experiment.data.positions is not None else []
        for where in [*given, *(where for where, _ in _placed_rows(experiment))]:
            yield f"{where}: expected positions that are the index, {reads}"


def _segments_are_texts(experiment: Experiment) -> Iterator[str]:
    model, data = experiment.model, experiment.data
    if not isinstance(model.memory, SegmentMemory | ActivationBeacon):
        return
    for axis, size in sequence_axes(experiment).items() if isinstance(model.memory, SegmentMemory) else ():
        yield f"mesh.{axis} = {size}: expected 1, as model.memory reads segments one after the other, each on one row's devices"
    for slot, layer in enumerate(model.pattern):
        if getattr(model.memory, "encoder", None) is not None and not isinstance(layer.mixer, Attention):
            yield f"model.pattern[{slot}].mixer: expected Attention beside model.memory.lora, which is added to its projections"
    if length_policy(model) is not None:
        yield "model: expected ropes and query scales that no length changes beside model.memory, in which positions begin anew"
    given = ["data.positions"] if data.positions is not None else []
    for where in [*given, *(path for path, _ in _placed_rows(experiment))]:
        yield f"{where}: expected positions that are the index, as those of model.memory begin anew"


def _beacons_are_read_by_attention(experiment: Experiment) -> Iterator[str]:
    model, memory, objective = experiment.model, experiment.model.memory, experiment.objective
    if not isinstance(memory, ActivationBeacon):
        if isinstance(objective, BeaconModeling):
            yield "model.memory: expected an ActivationBeacon, whose ratios objective draws"
        return
    for path, part in below(model, "model"):
        if isinstance(part, Mixer) and not isinstance(part, Attention) and path != "model.embed_mixer":
            yield f"{path}: expected Attention beside model.memory, an ActivationBeacon, whose beacons are keys"
    for path, mixer in _attentions(experiment):
        for field, plain in PLAIN.items():
            if getattr(mixer, field) != plain:
                yield f"{path}.{field}: expected {plain} beside model.memory, an ActivationBeacon, which says what a token sees"
    if model.position_table is not None:
        yield "model.position_table: expected None beside model.memory, an ActivationBeacon, in which positions begin anew"
    smallest = memory.ratio
    if isinstance(objective, BeaconModeling):
        if memory.window >= experiment.data.length:
            why = "as objective lets a document's last window be, and another has to be read through beacons"
            yield f"model.memory.window = {memory.window}: expected less than data.length = {experiment.data.length}, {why}"
        smallest = memory.smallest
        if missing := {*objective.ratios} - {memory.ratio, *memory.ratios}:
            yield f"objective.ratios = {objective.ratios}: expected those of model.memory, which has no {sorted(missing)}"
    shards = math.prod(sequence_axes(experiment).values())
    beacons = memory.beacons(experiment.data.length, whole=True, ratio=smallest)
    if beacons % shards:
        yield f"model.memory: {beacons} beacons in data.length: expected a multiple of the {shards} devices that share a row"


def _segments_are_drawn_of_a_memory(experiment: Experiment) -> Iterator[str]:
    memory, drawn = experiment.model.memory, isinstance(experiment.objective, RandomSegments)
    shortest = memory.shortest if isinstance(memory, SegmentMemory) else None
    if drawn and shortest is None:
        yield "model.memory: expected one between segments with `shortest` set, whose lengths objective draws"
    if not drawn and shortest is not None:
        yield f"model.memory.shortest = {shortest}: expected None, as objective draws no lengths of segments"


def _texts_are_told_back_by_an_encoder(experiment: Experiment) -> Iterator[str]:
    if isinstance(experiment.objective, Autoencoding) and getattr(experiment.model.memory, "encoder", None) is None:
        yield "model.memory: expected one with an encoder, such as ICAE, from whose vectors objective tells a text back"


def _prompts_are_seen_through_gists(experiment: Experiment) -> Iterator[str]:
    model, data = experiment.model, experiment.data
    if not isinstance(model.memory, Gist):
        return
    if model.memory.token >= model.vocab:
        yield f"model.memory.token = {model.memory.token}: expected a token below model.vocab = {model.vocab}"
    for path, rows in below(data, "data"):
        marks = data.tokenizer.encode(rows.mark).tolist() if isinstance(rows, Glossary) and rows.gists else []
        if marks and marks != [model.memory.token]:
            yield f"model.memory.token = {model.memory.token}: expected {marks[0]}, the gists of {path}"
    for path, part in below(model, "model"):
        if isinstance(part, Mixer) and not isinstance(part, Attention) and path != "model.embed_mixer":
            yield f"{path}: expected Attention beside model.memory, behind whose gists a prompt is hidden"
        if isinstance(part, Attention) and part.distances is not None and part.distances.reads_queries:
            yield f"{path}.distances: expected one that chooses by distance beside model.memory, which hides a prompt"


def _chunks_are_learned_in_turn(experiment: Experiment) -> Iterator[str]:
    if not isinstance(experiment.model.memory, TTTE2E):
        return
    yield from unfit(experiment.model)
    for axis, size in sequence_axes(experiment).items():
        yield f"mesh.{axis} = {size}: expected 1, as model.memory learns chunks one after the other, each on one row's devices"


def _trained_parameters_are_there(experiment: Experiment) -> Iterator[str]:
    if experiment.trainable is not None:
        try:
            trained_paths(abstract_model(experiment.model)[1], experiment.trainable)
        except SpecError as error:
            yield str(error)


def _counted_through(experiment: Experiment) -> list[str]:
    """Rows whose documents go on where the one before ended, though they are not one document."""
    through = lambda part: isinstance(part, Continuous) and part.sees != "whole row"
    return [f"{path} = {part}" for path, part in _placed_rows(experiment) if through(part)]


def _lengths_are_those_of_documents(experiment: Experiment) -> Iterator[str]:
    given = experiment.data.positions
    reaching = [f"data.positions = {given}"] if given is not None and not isinstance(given, CLEXPositions | RandomSteps) else []
    reaching += _moved_rows(experiment)
    for path, mixer in _attentions(experiment):
        rule, scale = experiment.model.rope_of(mixer), mixer.query_scale
        if scale is not None and scale.reads_lengths and reaching:
            expected = f"expected none of it, as {path}.query_scale, {type(scale).__name__}, goes by how long a document is"
            yield f"{reaching[0]}: {expected}, which skipped positions are not"
            return
        if isinstance(given, CLEXPositions) and isinstance(rule, LengthRule) and not isinstance(rule, CLEX):
            expected = f"expected none of it, as the rope of {path}, {type(rule).__name__}, has no row for the lengths it tells"
            yield f"data.positions = {given}: {expected}"
        if isinstance(rule, LongRoPE) and rule.kept_positions and _counted_through(experiment):
            expected = (
                f"expected none of it, as the rope of {path} keeps the first {rule.kept_positions} positions of a document"
            )
            yield f"{_counted_through(experiment)[0]}: {expected}, which only the first of these has"
        if isinstance(rule, LengthRule) and reaching:
            expected = f"expected none of it, as the rope of {path}, {type(rule).__name__}, goes by how long a document is"
            yield f"{reaching[0]}: {expected}, which skipped positions are not"
            return


def _positions_are_given_once(experiment: Experiment) -> Iterator[str]:
    for path, _ in _placed_rows(experiment) if experiment.data.positions is not None else ():
        yield f"data.positions = {experiment.data.positions}: expected None, as {path} has positions of its own"


def _heads_rotate(experiment: Experiment) -> Iterator[str]:
    for path, mixer in _attentions(experiment):
        rule = experiment.model.rope_of(mixer)
        if isinstance(rule, FrequencyRule):
            try:
                rule.frequencies(mixer.head_dim, max(experiment.data.length, _reach(experiment)))
            except SpecError as error:
                yield f"{path}.head_dim = {mixer.head_dim} does not fit its rope: {error}"


def _reach(experiment: Experiment) -> int:
    """A bound of the positions that rules and rows give, 0 if that of the rows' lengths is all."""
    rows = [part.spread(experiment.data.length) for _, part in _placed_rows(experiment)]
    return max([0 if experiment.data.positions is None else experiment.data.positions.bound(0), *rows])


def _keys_are_turned_anew(experiment: Experiment) -> Iterator[str]:
    for path, mixer in _attentions(experiment):
        rule = experiment.model.rope_of(mixer)
        if isinstance(rule, LengthRule) and getattr(mixer.cache, "keys", "raw") == "rotated":
            yield f"{path}.cache.keys = 'rotated': expected 'raw', as its rope turns a key anew when its document grows"


def _regions_turn_by_a_static_rope(experiment: Experiment) -> Iterator[str]:
    for path, mixer in _attentions(experiment):
        rule = experiment.model.rope_of(mixer)
        if mixer.distances is None:
            continue
        if rule is None:
            yield f"{path}.distances: expected None where model.rope is None: nothing turns"
        if experiment.data.positions is not None:
            yield f"data.positions = {experiment.data.positions}: expected None, as {path}.distances turns pairs by their index"
        for where, part in _placed_rows(experiment):
            if not isinstance(part, Continuous) or part.sees != "whole row":
                expected = f"expected rows whose positions are their indices, by which {path}.distances turns pairs"
                yield f"{where} = {type(part).__name__}: {expected}"
        if isinstance(rule, LengthRule) or (isinstance(rule, FrequencyRule) and rule.sections):
            yield f"{path}.distances turns pairs by {type(rule).__name__}: expected a rope of one axis that no length changes"


def _chunks_are_chosen_from_whole_rows(experiment: Experiment) -> Iterator[str]:
    for path, mixer in _attentions(experiment):
        if mixer.distances is None or not mixer.distances.reads_queries:
            continue
        kind, communication = type(mixer.distances).__name__, experiment.model.communication
        if sequence_axes(experiment) and not communication.whole_rows:
            expected = f"expected AllGather() or Ulysses(), as {path}.distances = {kind} chooses among all keys of a row"
            yield f"model.communication = {type(communication).__name__}(): {expected}"


def _positions_are_the_ropes(experiment: Experiment) -> Iterator[str]:
    given, rope = experiment.data.positions, experiment.model.rope
    if not isinstance(given, CLEXPositions):
        return
    fits = isinstance(rope, CLEX) and (rope.original_length, rope.largest) == (given.original_length, given.largest)
    if not fits:
        settings = f"original_length {given.original_length} and largest {given.largest}"
        yield f"model.rope = {type(rope).__name__}: expected CLEX of {settings}, whose positions data.positions gives"


def _one_length_policy(experiment: Experiment) -> Iterator[str]:
    try:
        length_policy(experiment.model)
    except SpecError as error:
        yield f"model: {error}"


def _rope_is_read(experiment: Experiment) -> Iterator[str]:
    if not reads_rope(experiment.model) and experiment.model.rope not in (None, Rope()):
        yield "model.rope: expected None, as no layer of this model reads it; set the rope of its mixers"


def _query_scales_act(experiment: Experiment) -> Iterator[str]:
    model = experiment.model
    for path, mixer in _attentions(experiment):
        skipped, slot = getattr(mixer.query_scale, "skip_layers", 0), re.match(r"model\.pattern\[(\d+)\]", path)
        if skipped and slot is None:
            yield f"{path}.query_scale.skip_layers = {skipped}: expected 0 outside the layers of the pattern, which are counted"
        elif skipped and skipped > (last := model.depth - len(model.pattern) + int(slot[1])):
            expected = f"expected at most {last}, so that some of the {model.depth} layers are scaled"
            yield f"{path}.query_scale.skip_layers = {skipped}: {expected}"


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
    "every sharded parameter axis is a multiple of the mesh axes that shard it": _parameters_divide,
    "key heads lie on the mesh as their query heads do, or every device has them": _queries_find_their_keys,
    "an activation's channels lie on other mesh axes than its tokens": _activations_lie_on_the_mesh,
    "the row length is a multiple of the mesh axes that shard the sequence, times the layout's parts": _sequence_divides,
    "parts that read neighbours get rows in their order": _order_is_kept,
    "heads can be shared out where the communication exchanges them": _queries_meet_keys,
    "the batch is a multiple of the mesh axes that shard it, times accumulation": _rows_divide,
    "every mesh axis shards something": _mesh_is_used,
    "the vocabulary holds every id of the tokenizer": _vocabulary_holds_tokens,
    "the vocabulary divides into the parts that the head is applied in": _vocabulary_divides,
    "positions are integers that float32 holds": _positions_are_exact,
    "fractions of a position are not lost in float32": _fractions_are_held,
    "a table of positions has a row for every place": _table_holds_rows,
    "positions are read by some layer": _positions_are_read,
    "a rope that goes by the length of documents gets no skipped positions": _lengths_are_those_of_documents,
    "positions come from the rows or from a rule": _positions_are_given_once,
    "positions have as many axes as the rope turns by": _axes_are_turned,
    "a token that all documents see is seen by every layer": _shared_tokens_are_seen,
    "a row holds no more documents than the model makes room for": _documents_have_room,
    "a model that reads by segments gets whole rows of plain text": _segments_are_texts,
    "beacons are keys of plain attention": _beacons_are_read_by_attention,
    "lengths of segments are drawn from a shortest to the longest": _segments_are_drawn_of_a_memory,
    "a text is told back from what an encoder made of it": _texts_are_told_back_by_an_encoder,
    "a prompt is seen through its gists alone": _prompts_are_seen_through_gists,
    "a model that trains itself while it reads sees a window, and gets whole rows": _chunks_are_learned_in_turn,
    "a mixer that reads places by their index gets no other positions": _places_are_positions,
    "what is to be trained is there": _trained_parameters_are_there,
    "every head has channels that its rope can rotate": _heads_rotate,
    "the model's rope is read by some layer": _rope_is_read,
    "a rope that depends on the length finds raw keys in the cache": _keys_are_turned_anew,
    "a distance plan turns by a rope of one axis that no length changes": _regions_turn_by_a_static_rope,
    "a plan that chooses chunks finds all keys of a row": _chunks_are_chosen_from_whole_rows,
    "a query scale acts in some layer": _query_scales_act,
    "positions of a learned rope meet that rope": _positions_are_the_ropes,
    "ropes that depend on the length agree whether it is frozen or growing": _one_length_policy,
    "a row is long enough for the recall sequences that fill it": _rows_fit,
    "a mask hides only roles that tokens have": _roles_exist,
}


_OF_TRAINING = (_vocabulary_holds_tokens, _segments_are_drawn_of_a_memory)  # what a model in use may do without


def _divides(
    experiment: Experiment, path: str, value: int, axes: tuple[str, ...], times: Mapping[str, int] | None = None
) -> Iterator[str]:
    factors = {f"mesh.{axis}": getattr(experiment.mesh, axis) for axis in axes} | dict(times or {})
    need = math.prod(factors.values())
    if value % need:
        shown = " * ".join(f"{name} {size}" for name, size in factors.items() if size > 1)
        yield f"{path} = {value}: expected a multiple of {need} ({shown})"


def _attentions(experiment: OnMesh) -> Iterator[tuple[str, Attention]]:
    for path, part in below(experiment.model, "model"):
        if isinstance(part, Attention):
            yield path, part
