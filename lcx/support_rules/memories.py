"""Rules of whole configs: memories get the rows, layers and objectives that they read."""

import math
from collections.abc import Iterator

from lcx.data.glossary import Glossary
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.gist import Gist
from lcx.memory.segment_memory import SegmentMemory
from lcx.memory.ttt_e2e import TTTE2E
from lcx.mixers.attention import Attention
from lcx.mixers.beacon_attention import PLAIN
from lcx.mixers.mixer import Mixer
from lcx.mixers.titans_mac import TitansMAC
from lcx.models.ttt_e2e_fit import unfit
from lcx.objectives.autoencoding import Autoencoding
from lcx.objectives.beacon_modeling import BeaconModeling
from lcx.objectives.random_segments import RandomSegments
from lcx.positions.length_rule import LengthRule, length_policy
from lcx.spec import below
from lcx.support_rules.walk import attentions, placed_rows, sequence_axes
from lcx.training.experiment import Experiment


def documents_have_room(experiment: Experiment) -> Iterator[str]:
    room, length = experiment.model.documents, experiment.data.length
    chunked = [(path, part) for path, part in below(experiment.model, "model") if getattr(part, "chunked", False)]
    for i, kind in enumerate(experiment.data.mixture if chunked else ()):
        most, (path, part) = kind.rows.documents(length), chunked[0]
        if most > room:
            kind_of = f"{path}, a {type(part).__name__}, has to hold them all"
            why = f"documents that data.mixture[{i}].rows may put into a row: {kind_of}"
            hint = f"; data.mixture[{i}].rows.most can limit them" if getattr(kind.rows, "most", 0) is None else ""
            yield f"model.documents = {room}: expected at least the {most} {why}{hint}"


def places_are_positions(experiment: Experiment) -> Iterator[str]:
    for path, part in below(experiment.model, "model"):
        if not (isinstance(part, Mixer) and part.by_index):
            continue
        reads = f"as {path}, a {type(part).__name__}, reads places by their index"
        if isinstance(part, TitansMAC) and isinstance(experiment.model.rope_of(part.attention), LengthRule):
            yield f"{path}.attention turns by a rope of a document's length: expected one that no length changes, {reads}"
        given = [f"data.positions = {experiment.data.positions}"] if experiment.data.positions is not None else []
        for where in [*given, *(where for where, _ in placed_rows(experiment))]:
            yield f"{where}: expected positions that are the index, {reads}"


def segments_are_texts(experiment: Experiment) -> Iterator[str]:
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
    for where in [*given, *(path for path, _ in placed_rows(experiment))]:
        yield f"{where}: expected positions that are the index, as those of model.memory begin anew"


def beacons_are_read_by_attention(experiment: Experiment) -> Iterator[str]:
    model, memory, objective = experiment.model, experiment.model.memory, experiment.objective
    if not isinstance(memory, ActivationBeacon):
        if isinstance(objective, BeaconModeling):
            yield "model.memory: expected an ActivationBeacon, whose ratios objective draws"
        return
    for path, part in below(model, "model"):
        if isinstance(part, Mixer) and not isinstance(part, Attention) and path != "model.embed_mixer":
            yield f"{path}: expected Attention beside model.memory, an ActivationBeacon, whose beacons are keys"
    for path, mixer in attentions(experiment):
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


def segments_are_drawn_of_a_memory(experiment: Experiment) -> Iterator[str]:
    memory, drawn = experiment.model.memory, isinstance(experiment.objective, RandomSegments)
    shortest = memory.shortest if isinstance(memory, SegmentMemory) else None
    if drawn and shortest is None:
        yield "model.memory: expected one between segments with `shortest` set, whose lengths objective draws"
    if not drawn and shortest is not None:
        yield f"model.memory.shortest = {shortest}: expected None, as objective draws no lengths of segments"


def texts_are_told_back_by_an_encoder(experiment: Experiment) -> Iterator[str]:
    if isinstance(experiment.objective, Autoencoding) and getattr(experiment.model.memory, "encoder", None) is None:
        yield "model.memory: expected one with an encoder, such as ICAE, from whose vectors objective tells a text back"


def prompts_are_seen_through_gists(experiment: Experiment) -> Iterator[str]:
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


def chunks_are_learned_in_turn(experiment: Experiment) -> Iterator[str]:
    if not isinstance(experiment.model.memory, TTTE2E):
        return
    yield from unfit(experiment.model)
    for axis, size in sequence_axes(experiment).items():
        yield f"mesh.{axis} = {size}: expected 1, as model.memory learns chunks one after the other, each on one row's devices"
