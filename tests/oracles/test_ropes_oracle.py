"""Frequency rules give `transformers`' frequencies and factors on a grid of configs.

Those are float32 throughout, ours float64: measured, the largest error of a frequency is 4e-7, where a ramp blends it (YaRN,
Llama 3) 2.2e-6, since there the rounding is that of the frequency before it is slowed; factors are equal. The same functions
with float64 in place of float32 differ from ours by 7e-16.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import ropes

from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.frequencies import FrequencyRule, geometric
from lcx.positions.linear import LinearInterpolation
from lcx.positions.llama3 import Llama3
from lcx.positions.longrope import LongRoPE
from lcx.positions.proportional import Proportional
from lcx.positions.yarn import YaRN


def rule(rope: dict, length: int) -> FrequencyRule:
    """The rule of transformers' rope parameters and max_position_embeddings."""
    shared = {"base": rope["rope_theta"], "rotary": rope.get("partial_rotary_factor", 1.0)}
    if rope["rope_type"] == "linear":
        return LinearInterpolation(factor=rope["factor"], **shared)
    if rope["rope_type"] == "proportional":
        return Proportional(base=rope["rope_theta"], ratio=rope["partial_rotary_factor"], factor=rope["factor"])
    if rope["rope_type"] == "dynamic":
        return DynamicNTK(original_length=length, factor=rope["factor"], **shared)
    shared |= {"factor": rope["factor"], "original_length": rope["original_max_position_embeddings"]}
    if rope["rope_type"] == "llama3":
        return Llama3(low=rope["low_freq_factor"], high=rope["high_freq_factor"], **shared)
    if rope["rope_type"] == "longrope":
        lists = {name: tuple(rope[f"{name}_factor"]) for name in ("short", "long")}
        return LongRoPE(temperature=rope.get("attention_factor"), **lists, **shared)
    names = {"beta_fast": "fast", "beta_slow": "slow", "attention_factor": "temperature"}
    names |= {name: name for name in ("truncate", "mscale", "mscale_all_dim")}
    return YaRN(**shared, **{ours: rope[theirs] for theirs, ours in names.items() if theirs in rope})


def compare(held: dict) -> None:
    cases = json.loads(str(held["cases"]))
    expected = np.split(held["inv_freq"], np.cumsum(held["pairs"])[:-1])
    for case, inv_freq, factor in zip(cases, expected, held["factors"], strict=True):
        n = case["seq_len"] or 1
        found = rule(case["rope"], case["length"]).frequencies(case["head_dim"], n).at(n)
        blended = case["rope"]["rope_type"] in ("yarn", "llama3")
        rounding = 1.2e-7 * geometric(case["rope"]["rope_theta"], 2 * len(inv_freq)) if blended else 0.0
        assert (np.abs(found.inv_freq - inv_freq) <= 1e-6 * inv_freq + rounding).all(), case
        np.testing.assert_allclose(found.factor, factor, rtol=1e-12, err_msg=str(case))


def test_golden_frequencies():
    with np.load(Path(__file__).parent / "golden" / "ropes.npz") as held:
        compare(dict(held))


@pytest.mark.oracle
def test_live_frequencies():
    compare(ropes.arrays())
