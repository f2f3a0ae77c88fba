"""Rules of whole configs: positions are read, exact and reached, and ropes and plans find what they count on."""

import re
from collections.abc import Iterator

import numpy as np

from lcx.batch import EXACT_POSITIONS
from lcx.data.continuous import Continuous
from lcx.data.skipped import Skipped
from lcx.memory.segment_memory import SegmentMemory
from lcx.positions.clex import CLEX
from lcx.positions.clex_positions import CLEXPositions
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import LengthRule, length_policy
from lcx.positions.longrope import LongRoPE
from lcx.positions.position_rule import RandomSteps
from lcx.positions.rope import Rope
from lcx.spec import SpecError, below
from lcx.support_rules.walk import attentions, moved_rows, placed_rows, reads_rope
from lcx.training.experiment import Experiment


def positions_are_exact(experiment: Experiment) -> Iterator[str]:
    data = experiment.data
    if data.length > EXACT_POSITIONS:
        yield f"data.length = {data.length}: expected at most 2^24 = {EXACT_POSITIONS}, where positions are exact"
    if data.positions is not None and data.positions.bound(0) > EXACT_POSITIONS:
        yield f"data.positions = {data.positions}: expected a target of at most 2^24 = {EXACT_POSITIONS}"
    if data.positions is not None and data.positions.reach is not None and data.positions.reach < data.length:
        yield f"data.positions = {data.positions}: expected a target of at least data.length = {data.length}"


def fractions_are_held(experiment: Experiment) -> Iterator[str]:
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


def table_holds_rows(experiment: Experiment) -> Iterator[str]:
    table, length = experiment.model.position_table, max(experiment.data.length, _reach(experiment))
    if table is None:
        return
    if isinstance(memory := experiment.model.memory, SegmentMemory):
        length = max(memory.segment + memory.around, memory.asks)
    given = experiment.data.positions
    if table.reads_lengths and given is not None and not given.tells_length:
        yield f"data.positions = {given}: expected None or a rule that tells a length, which model.position_table reads"
    for path, rows in placed_rows(experiment):
        if table.reads_lengths or not isinstance(rows, Continuous | Skipped):
            yield f"{path} = {type(rows).__name__}: expected rows whose positions are the index beside model.position_table"
    if table.reach is not None and table.reach < length:
        yield f"data: positions up to {length}: expected at most the {table.reach} places that model.position_table reads"


def positions_are_read(experiment: Experiment) -> Iterator[str]:
    model, given = experiment.model, experiment.data.positions
    reads = model.position_table is not None or any(model.rope_of(mixer) is not None for _, mixer in attentions(experiment))
    for name in ([f"data.positions = {given}"] if given is not None else []) + moved_rows(experiment):
        if not reads:
            yield f"{name}: expected none of it, as no layer of this model has a rope, which reads positions"
        elif model.position_table is not None and given is not None and given.step(experiment.data.length) != 1.0:
            yield f"{name}: expected whole numbers beside model.position_table, which has a row for each"


def axes_are_turned(experiment: Experiment) -> Iterator[str]:
    for path, rows in placed_rows(experiment) if experiment.data.position_axes > 1 else ():
        for where, mixer in attentions(experiment):
            rule = experiment.model.rope_of(mixer)
            turned = max(1, len(rule.sections)) if isinstance(rule, FrequencyRule) else 1
            if rule is not None and rows.position_axes not in (1, turned):
                axes = f"{path} = {type(rows).__name__} of {rows.position_axes} position axes"
                yield f"{axes}: expected {turned}, which the rope of {where} turns by"


def shared_tokens_are_seen(experiment: Experiment) -> Iterator[str]:
    anchors = [path for path, part in placed_rows(experiment) if part.shares]
    for path, part in below(experiment.model, "model") if anchors else ():
        if getattr(part, "recurrent", False):
            begins = f"{path}, a {type(part).__name__}, begins each document with an empty state"
            yield f"{anchors[0]}.sees = 'anchor': expected another, as {begins}"


def _counted_through(experiment: Experiment) -> list[str]:
    """Rows whose documents go on where the one before ended, though they are not one document."""
    through = lambda part: isinstance(part, Continuous) and part.sees != "whole row"
    return [f"{path} = {part}" for path, part in placed_rows(experiment) if through(part)]


def lengths_are_those_of_documents(experiment: Experiment) -> Iterator[str]:
    given = experiment.data.positions
    reaching = [f"data.positions = {given}"] if given is not None and not isinstance(given, CLEXPositions | RandomSteps) else []
    reaching += moved_rows(experiment)
    for path, mixer in attentions(experiment):
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


def positions_are_given_once(experiment: Experiment) -> Iterator[str]:
    for path, _ in placed_rows(experiment) if experiment.data.positions is not None else ():
        yield f"data.positions = {experiment.data.positions}: expected None, as {path} has positions of its own"


def heads_rotate(experiment: Experiment) -> Iterator[str]:
    for path, mixer in attentions(experiment):
        rule = experiment.model.rope_of(mixer)
        if isinstance(rule, FrequencyRule):
            try:
                rule.frequencies(mixer.head_dim, max(experiment.data.length, _reach(experiment)))
            except SpecError as error:
                yield f"{path}.head_dim = {mixer.head_dim} does not fit its rope: {error}"


def _reach(experiment: Experiment) -> int:
    """A bound of the positions that rules and rows give, 0 if that of the rows' lengths is all."""
    rows = [part.spread(experiment.data.length) for _, part in placed_rows(experiment)]
    return max([0 if experiment.data.positions is None else experiment.data.positions.bound(0), *rows])


def keys_are_turned_anew(experiment: Experiment) -> Iterator[str]:
    for path, mixer in attentions(experiment):
        rule = experiment.model.rope_of(mixer)
        if isinstance(rule, LengthRule) and getattr(mixer.cache, "keys", "raw") == "rotated":
            yield f"{path}.cache.keys = 'rotated': expected 'raw', as its rope turns a key anew when its document grows"


def regions_turn_by_a_static_rope(experiment: Experiment) -> Iterator[str]:
    for path, mixer in attentions(experiment):
        rule = experiment.model.rope_of(mixer)
        if mixer.distances is None:
            continue
        if rule is None:
            yield f"{path}.distances: expected None where model.rope is None: nothing turns"
        if experiment.data.positions is not None:
            yield f"data.positions = {experiment.data.positions}: expected None, as {path}.distances turns pairs by their index"
        for where, part in placed_rows(experiment):
            if not isinstance(part, Continuous) or part.sees != "whole row":
                expected = f"expected rows whose positions are their indices, by which {path}.distances turns pairs"
                yield f"{where} = {type(part).__name__}: {expected}"
        if isinstance(rule, LengthRule) or (isinstance(rule, FrequencyRule) and rule.sections):
            yield f"{path}.distances turns pairs by {type(rule).__name__}: expected a rope of one axis that no length changes"
        elif isinstance(rule, FrequencyRule):
            try:
                mixer.distances.check_model(experiment.model.depth, mixer.heads, rule.rotated(mixer.head_dim) // 2)
            except SpecError as error:
                yield f"{path}.distances: {error}"


def positions_are_the_ropes(experiment: Experiment) -> Iterator[str]:
    given, rope = experiment.data.positions, experiment.model.rope
    if not isinstance(given, CLEXPositions):
        return
    fits = isinstance(rope, CLEX) and (rope.original_length, rope.largest) == (given.original_length, given.largest)
    if not fits:
        settings = f"original_length {given.original_length} and largest {given.largest}"
        yield f"model.rope = {type(rope).__name__}: expected CLEX of {settings}, whose positions data.positions gives"


def one_length_policy(experiment: Experiment) -> Iterator[str]:
    try:
        length_policy(experiment.model)
    except SpecError as error:
        yield f"model: {error}"


def rope_is_read(experiment: Experiment) -> Iterator[str]:
    if not reads_rope(experiment.model) and experiment.model.rope not in (None, Rope()):
        yield "model.rope: expected None, as no layer of this model reads it; set the rope of its mixers"


def query_scales_act(experiment: Experiment) -> Iterator[str]:
    model = experiment.model
    for path, mixer in attentions(experiment):
        skipped, slot = getattr(mixer.query_scale, "skip_layers", 0), re.match(r"model\.pattern\[(\d+)\]", path)
        if skipped and slot is None:
            yield f"{path}.query_scale.skip_layers = {skipped}: expected 0 outside the layers of the pattern, which are counted"
        elif skipped and skipped > (last := model.depth - len(model.pattern) + int(slot[1])):
            expected = f"expected at most {last}, so that some of the {model.depth} layers are scaled"
            yield f"{path}.query_scale.skip_layers = {skipped}: {expected}"
