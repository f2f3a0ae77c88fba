"""A model's rope for a longer window: a plain one becomes YaRN (Peng et al. 2023), one with a factor gets a larger factor."""

import dataclasses

from lcx.positions.frequencies import FrequencyRule
from lcx.positions.linear import LinearInterpolation
from lcx.positions.llama3 import Llama3
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError


def extended(rule: FrequencyRule, window: int, factor: float) -> tuple[FrequencyRule, int]:
    """(the rule, its window) for `factor` times the window of a model that has `rule`.

    window: as trained. A factor that the rule has already is multiplied and its own trained window stays, so that the slow
    channels turn as far in the longer window as they did in the old one. Of YaRN the old window is no shorter than what its
    factor reaches. Raises SpecError for a rule whose extension is not a factor.
    """
    if type(rule) is Rope:
        fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
        return YaRN(factor=factor, original_length=window, **fields), round(factor * window)
    if type(rule) not in (YaRN, LinearInterpolation, Llama3):
        expected = "expected Rope, YaRN, LinearInterpolation or Llama3, or model.rope and data.length set by themselves"
        raise SpecError(f"rope = {type(rule).__name__}: no factor extends it: {expected}")
    if type(rule) is YaRN:
        rule.check(isinstance(rule.temperature, str), "temperature", "'yarn' or 'none', as a number is that of one factor")
        window = max(window, round(rule.factor * rule.original_length))
    return dataclasses.replace(rule, factor=factor * rule.factor), round(factor * window)
