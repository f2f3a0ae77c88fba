"""Rows whose tokens have positions of their own, from a rule for visual documents (`lcx.positions.visual`)."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lcx.batch import EXACT_POSITIONS
from lcx.cache.kv_cache import KVCache
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.segment_memory import SegmentMemory
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Mixer
from lcx.models.decoder import Decoder
from lcx.positions.length_rule import LengthRule
from lcx.positions.visual import Placed
from lcx.spec import SpecError, below


def padded_positions(
    spec: Decoder, rows: Sequence[Sequence[int]], placed: Sequence[Placed], length: int, count: int
) -> Float[np.ndarray, "B T P"]:
    """Positions of `count` right-padded rows, those behind the given ones empty.

    Raises ValueError for positions that are not those of the rows, or that no layer of the model reads.
    """
    sizes = [len(row) for row in rows]
    if [len(row.positions) for row in placed] != sizes or len({row.positions.shape[1] for row in placed}) > 1:
        found = [row.positions.shape for row in placed]
        raise ValueError(f"placed of {found}: expected a position for each of {sizes} tokens, with as many axes")
    if isinstance(spec.memory, SegmentMemory | ActivationBeacon):
        raise ValueError(f"placed: expected none beside {type(spec.memory).__name__}, in which positions begin anew")
    check_axes(spec, placed[0].positions.shape[1])
    _check_reach(spec, math.ceil(max(np.abs(row.positions).max(initial=0) for row in placed)) + 1)
    if spec.position_table is not None and any((row.positions != np.round(row.positions)).any() for row in placed):
        raise ValueError("placed: expected whole numbers beside model.position_table, which has a row for each")
    positions = np.zeros((count, length, placed[0].positions.shape[1]), np.float32)
    for n, row in enumerate(placed):
        positions[n, : sizes[n]] = row.positions
    return positions


def behind(placed: Sequence[Placed], count: int, new: int) -> tuple[Float[np.ndarray, "B"], Int[np.ndarray, "B"]]:
    """Where `new` tokens behind each of `count` rows begin: the place of the first, and its index.

    Raises ValueError where positions are no longer exact.
    """
    if (following := max(row.following for row in placed)) + new > EXACT_POSITIONS:
        expected = f"expected new tokens up to 2^24 = {EXACT_POSITIONS}, where positions are exact"
        raise ValueError(f"placed.following = {following} and max_new = {new}: {expected}")
    empty = [0] * (count - len(placed))
    places = np.asarray([*(row.following for row in placed), *empty], np.float32)
    return places, np.asarray([*(len(row.positions) for row in placed), *empty], np.int32)


def _check_reach(spec: Decoder, reach: int) -> None:
    """Raises ValueError if a rope of the model does not turn positions as large."""
    for path, part in below(spec, "model"):
        if isinstance(part, Attention) and (rope := spec.rope_of(part)) is not None:
            try:
                rope.frequencies(part.head_dim, reach)
            except SpecError as error:
                raise ValueError(f"placed: positions up to {reach - 1} by the rope of {path}: {error}") from None


def check_axes(spec: Decoder, axes: int) -> None:
    """Raises ValueError if the model does not read positions of so many axes."""
    if spec.position_table is not None and axes > 1:
        raise ValueError(f"placed of {axes} axes: expected 1 beside model.position_table")
    mixers = {path: part for path, part in below(spec, "model") if isinstance(part, Attention)}
    ropes = {path: rope for path, mixer in mixers.items() if (rope := spec.rope_of(mixer)) is not None}
    if not ropes and spec.position_table is None:
        raise ValueError("placed: expected None, as no layer of the model has a rope, which reads positions")
    for path, part in below(spec, "model"):
        if isinstance(part, Mixer) and part.by_index:
            raise ValueError(f"placed: expected None, as {path}, a {type(part).__name__}, reads places by their index")
    for path, rope in ropes.items():
        scale = mixers[path].query_scale
        if isinstance(rope, LengthRule) or (scale is not None and scale.reads_lengths):
            raise ValueError(
                f"placed: expected None, as {path} goes by how many tokens a document has, which places do not tell"
            )
        cache = mixers[path].cache
        if isinstance(cache, KVCache) and (cache.positions == "slots" or (cache.policy and cache.policy.expects_turns)):
            raise ValueError(f"placed: expected None, as {path}.cache says by index where tokens stand")
        if mixers[path].distances is not None:
            raise ValueError(f"placed: expected None, as {path}.distances turns pairs by their index")
        most = max(1, len(rope.sections))
        if axes not in (1, most):
            accepted = "1" if most == 1 else f"1 or {most}"
            raise ValueError(f"placed of {axes} axes: expected {accepted}, which the rope of {path} reads")
