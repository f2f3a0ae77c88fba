"""What the positions of a model come to, in words: wavelengths, how far its ropes and distance plans reach, and what logits are
multiplied by."""

import math

import numpy as np

from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.positions.analysis import Reach, reach
from lcx.positions.distance_plan import DistancePlan
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import LengthRule


def position_figures(model: Decoder, length: int, trained: int | None = None, spread: int | None = None) -> dict[str, str]:
    """Of every attention layer of the pattern, in rows of `length` tokens. trained: tokens of the rows that the model was
    trained on, for ropes that name no window. spread: distances that training with the ropes it has reached."""
    widened = None if spread is None or spread <= (trained or length) else spread
    found = {}
    for i, layer in enumerate(model.pattern):
        mixer = layer.mixer
        if not isinstance(mixer, Attention):
            continue
        rule = model.rope_of(mixer)
        shown = None if isinstance(rule, LengthRule) else widened  # its frequencies are others where places are skipped
        far = None if rule is None else reach(rule, mixer.head_dim, length, trained, shown)
        if mixer.distances is not None:
            words = "" if far is None else f"; {plan_words(mixer.distances, far)}"
            found[f"distances of pattern[{i}]"] = f"{mixer.distances}{words}"
        if mixer.distance_bias is not None:
            found[f"distance_bias of pattern[{i}]"] = str(mixer.distance_bias)
        if rule is None or far is None:
            found[f"rope of pattern[{i}]"] = "none"
        else:
            scale = far.scale * _query_scale(model, i, length)
            words = rope_words(rule, far, mixer.head_dim, length)
            found[f"rope of pattern[{i}], {type(rule).__name__}"] = f"{words}; logits x {scale:.4g} at the end"
    return found


def rope_words(rule: FrequencyRule, far: Reach, head_dim: int, length: int) -> str:
    """Wavelengths in tokens, and how far the rule reads."""
    frequencies = rule.frequencies(head_dim, length).at(length)
    turning = frequencies.inv_freq[frequencies.inv_freq > 0]
    waves = 2 * math.pi / turning
    within, window = length, f"trained window {far.trained}"
    if far.spread is not None:
        within, window = max(length, far.spread), f"{window}, distances to {far.spread}"
    return (
        f"{len(turning)} pairs, wavelengths {waves.min():.4g} to {waves.max():.4g} tokens, "
        f"{int(np.sum(waves <= within))} turn within {within}; {window}: critical dimension "
        f"{far.critical_dimension}, effective window {far.effective or 'any'}"
    )


def plan_words(plan: DistancePlan, far: Reach) -> str:
    """How many tokens the plan reads before it meets positions beyond the effective window of its rope."""
    if far.effective is None:
        return "its rope meets no new angle at any length"
    every, some = plan.reach(far.effective)
    within = f"stays within {far.effective} positions"
    if every is None:
        return f"{within} at any length"
    return f"{within} up to {every} tokens" + ("" if some == every else f", {some} for some pairs of channels")


def _query_scale(model: Decoder, slot: int, length: int) -> float:
    """The factor of the last query of a row, in the deepest layer of the slot."""
    scale, last = model.pattern[slot].mixer.query_scale, model.depth - len(model.pattern) + slot
    end = (np.asarray([[n]], np.int32) for n in (length - 1, last, length))
    return 1.0 if scale is None else float(scale.scale(*end)[0, 0])
