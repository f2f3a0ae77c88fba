"""The search's loss is the model's own perplexity under the rope in question, and a search on a shipped model runs."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.data.tokenizers import ByteTokenizer
from lcx.evaluation import longrope_factors
from lcx.evaluation.longrope_factors import harmonic, longrope, perplexity
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.positions.longrope import LongRoPE
from lcx.positions.rope import Rope
from lcx.spec import edit


def test_perplexity_is_that_of_the_model_under_the_rope():
    layer = Layer(mixer=Attention(heads=2, kv_heads=1, head_dim=8), channel=GLU(hidden=16))
    model = Decoder(vocab=264, width=16, pattern=(layer,), periods=2).build(rngs=nnx.Rngs(0))
    rows = np.random.default_rng(0).integers(0, 256, (3, 16)).astype(np.int32)
    found = []
    for kept in (0, 2):
        rope = longrope(Rope(), (1.0, 1.5, 2.0, 4.0), trained=8, scale=2.0, kept=kept)
        assert rope == LongRoPE(original_length=8, short=(1.0,) * 4, long=rope.long, factor=2.0, kept_positions=kept)
        other = rebuild(model, edit(model.spec, "rope", rope))
        logits = jax.jit(lambda m: m.logits(m(Batch(tokens=rows, info=causal_info(np.ones_like(rows))))[0]))(other)
        logits = np.asarray(logits, np.float64)[:, :-1]
        losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
        found.append(perplexity(model, ByteTokenizer(), rows.tolist(), rope))
        np.testing.assert_allclose(found[-1], np.exp(losses.mean()), rtol=1e-5)
    assert found[0] != found[1]


def test_the_search_begins_at_yarns_harmonic_factors():
    """Of 16 pairs, base 1e4, 128 tokens: none turns 32 times, so the ramp begins at pair 0; it ends where a pair turns once."""
    factors = np.asarray(harmonic(Rope(), 32, trained=128, scale=4.0))
    end = np.ceil(16 * np.log(128 / (2 * np.pi)) / np.log(1e4))
    np.testing.assert_allclose(factors, 1 + 3 * np.clip(np.arange(16) / end, 0, 1), rtol=1e-12)


@pytest.mark.slow
def test_a_shipped_model_is_searched(monkeypatch, capsys):
    evolution = {"population": 3, "iterations": 2, "parents": 2, "mutants": 1, "crossings": 1}
    for name, value in (("EVOLUTION", evolution), ("WINDOWS", 2), ("KEPT", (0, 4))):
        monkeypatch.setattr(longrope_factors, name, value)
    longrope_factors.main("copier", "4")
    said = capsys.readouterr().out
    history = [float(value) for value in re.search(r"generation: (.*)", said)[1].split(", ")]
    assert history == sorted(history, reverse=True) and len(history) == 4
    assert f"| 0 | {history[-1]:.3f} |" in said and "| 4 |" in said
