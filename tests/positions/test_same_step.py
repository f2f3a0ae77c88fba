"""A frequency rule costs nothing: the program of a training step is the same for all of them, up to its constants.

Apart are rules of the length, which look a table up, sections, which pick an axis, CLEX, which solves its equation, and xPos,
which scales.
"""

import functools
import re

import jax
import pytest
from flax import nnx

from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.parts import parts
from lcx.plan import abstract_batch
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import LengthRule
from lcx.positions.rope import Rope
from lcx.positions.xpos import XPos
from lcx.training.step import abstract_model, bind

RULES = [
    rule
    for cls in parts(FrequencyRule)
    for rule in cls.examples()
    if not isinstance(rule, LengthRule | XPos) and not rule.sections and rule.rotary == 1 and rule.pairing == "half"
]


@functools.cache
def program(rule) -> str:
    """Of the loss gradient, before the compiler; numbers that are written into it left out."""
    mixer = Attention(heads=2, kv_heads=1, head_dim=16)
    model = Decoder(vocab=32, width=16, pattern=(Layer(mixer=mixer, channel=GLU(hidden=16)),), periods=2, rope=rule)
    graph, state = abstract_model(model)

    def loss(params, batch):
        return bind(graph, state, params)(batch)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(nnx.to_pure_dict(state), abstract_batch(2, 24)).as_text()
    return re.sub(r"dense<[^>]*>", "dense<>", text)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_program_is_that_of_plain_rope(rule):
    assert program(rule) == program(Rope())
