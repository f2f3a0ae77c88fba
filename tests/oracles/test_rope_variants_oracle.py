"""Frequency rules, sections and a query scale give what the authors' code gives."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import rope_variants as authors

from lcx.positions.axial import AxialRope
from lcx.positions.base_multiplier import BaseMultiplier
from lcx.positions.dprope import DPRoPE, disturbance
from lcx.positions.dynamic_yarn import DynamicYaRN
from lcx.positions.frequencies import geometric
from lcx.positions.hope import HoPE
from lcx.positions.linear import LinearInterpolation
from lcx.positions.mrope_plus_plus import MRopePlusPlus
from lcx.positions.ntk import NTK
from lcx.positions.power_basis import PowerBasis
from lcx.positions.query_scale import LogN
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.positions.truncated_basis import TruncatedBasis
from lcx.positions.xpos import XPos
from lcx.positions.yarn import YaRN


@pytest.fixture(scope="module")
def held():
    with np.load(Path(__file__).parent / "golden" / "rope_variants.npz") as found:
        return dict(found)


def test_giraffe(held):
    """Measured, up to 2e-7: the code computes in float32."""
    for n, (dim, scale, power, length) in enumerate(authors.GIRAFFE):
        rule = LinearInterpolation(factor=scale)
        if power or length:
            rule = PowerBasis(power=power) if power else TruncatedBasis(original_length=length)
        np.testing.assert_allclose(rule.frequencies(dim, 0).inv_freq, held[f"giraffe/{n}"], rtol=1e-6)


def test_xpos(held):
    """Products of turned queries and keys, in any order of tokens; the code counts from the middle of the row."""
    frequencies = XPos(pairing="interleaved").frequencies(authors.DIM, authors.XPOS_LENGTH)
    places = jnp.arange(authors.XPOS_LENGTH, dtype=jnp.float32)[None, :, None]
    turn = lambda x, side: rotate(jnp.asarray(x)[None, :, None], places, frequencies, side=side)[0, :, 0]
    products = turn(held["xpos/q"], "query") @ turn(held["xpos/k"], "key").T
    np.testing.assert_allclose(products, held["xpos"], atol=2e-6 * np.abs(held["xpos"]).max())


def test_dprope(held):
    """The reverse divergence interpolates the same pairs. Measured, divergences differ by up to 5e-4: histograms are smoothed
    by 6e-5 of a count there, by 1e-8 of a share here."""
    for n, (dim, window, factor) in enumerate(authors.DPROPE):
        theta = geometric(1e4, dim)
        rule = DPRoPE(factor=float(factor), original_length=window, divergence="old_to_new")
        np.testing.assert_allclose(rule.frequencies(dim, 0).inv_freq, theta / held[f"dprope/{n}/factors"], rtol=1e-12)
        given = tuple(theta), window, factor * window, rule.bins, rule.divergence
        found = [disturbance(tuple(new), *given) for new in (theta, theta / factor)]
        np.testing.assert_allclose(found, held[f"dprope/{n}/scores"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", authors.FACTORS)
def test_ntk_dynamic_yarn_and_wavelengths(held, factor):
    for n, (dim, window) in enumerate(authors.YARN):
        rules = {
            "ntk": NTK(factor=factor),
            "dynamic_yarn": DynamicYaRN(original_length=window, step=window // 2),
            "harmonic": YaRN(factor=factor, original_length=window, ramp="harmonic"),
        }
        length = int(factor * window)
        found = {name: rule.frequencies(dim, length).at(length) for name, rule in rules.items()}
        for name, given in found.items():
            np.testing.assert_allclose(given.inv_freq, held[f"yarn/{n}/{factor}/{name}"], rtol=1e-12)
        temperatures = [found["dynamic_yarn"].factor, found["harmonic"].factor]
        np.testing.assert_allclose(temperatures, held[f"yarn/{n}/{factor}/temperature"], rtol=1e-12)


def test_mrope_plus_plus(held):
    for n, (dim, window, target, sections) in enumerate(authors.MROPE_PLUS_PLUS):
        rule = MRopePlusPlus(factor=target / window, original_length=window, sections=sections, form="code")
        np.testing.assert_allclose(rule.frequencies(dim, 0).inv_freq, held[f"mrope_plus_plus/{n}"], rtol=1e-6)


@pytest.mark.parametrize(
    "name, rule",
    [
        ("multimodal", Rope(sections=authors.SECTIONS)),
        ("video", Rope(sections=authors.SECTIONS, section_order="alternating")),
        ("hybrid", HoPE(sections=authors.SECTIONS)),
        ("interleaved", Rope(sections=authors.INTERLEAVED, section_order="interleaved")),
        ("axial", AxialRope(sections=authors.SECTIONS)),
    ],
)
def test_sections(held, name, rule):
    """Of Qwen2-VL, VideoRoPE, HoPE, Qwen3-VL, FLUX, at positions on three axes, fractions and negative ones among them."""
    found = rotate(jnp.asarray(held["sections/x"]), jnp.asarray(held["sections/positions"]), rule.frequencies(authors.DIM, 0))
    np.testing.assert_allclose(found, held[f"sections/{name}"], rtol=0, atol=3e-6)


def test_entropy_abf(held):
    found = LogN(original_length=4096).scale(jnp.asarray([authors.PLACES]))
    np.testing.assert_allclose(found[0], held["entropy_abf"], rtol=2e-7)


@pytest.mark.parametrize(
    "model, base, trained, targets",
    [
        ("llada", 5e5, 4096, (8192, 16_384, 24_576, 32_768)),
        ("llama", 5e5, 8192, (16_384, 32_768)),
        ("dream", 1e6, 2048, (4096,)),
    ],
)
def test_longllada(held, model, base, trained, targets):
    """The multipliers of the paper's windows are those that its evaluations run."""
    rules = (BaseMultiplier(multiplier="auto", base=base, original_length=trained, target_length=n) for n in targets)
    assert [rule.resolved(128) for rule in rules] == held[f"longllada/{model}"].tolist()
