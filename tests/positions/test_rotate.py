"""Angles at far positions against exact arithmetic, and the algebra of the rotation."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from lcx.positions.frequencies import Frequencies, geometric
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate, turns

FAR = [0, 1, 2**20, 4_000_000, 2**24 - 1, 2**24]


def frequencies(inv_freq, pairing="half", factor=1.0):
    return Frequencies(inv_freq=inv_freq, axis=np.zeros(len(inv_freq), np.int32), pairing=pairing, factor=factor)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0, 1.5])
def test_angles_are_right_at_far_positions(base):
    rule = frequencies(geometric(base, 64))
    given = np.asarray(turns(jnp.asarray(FAR, jnp.float32)[None, :, None], rule))[0]
    for row, position in zip(given, FAR, strict=True):
        for got, omega in zip(row, rule.inv_freq, strict=True):
            exact = Fraction(float(omega / (2 * np.pi))) * position
            error = Fraction(float(got)) - exact
            assert abs(error - round(error)) * 2 * np.pi < 1e-4


def test_fractional_and_negative_positions():
    positions = np.float32([0.25, -3.5, 1234.125, -70_000.75])
    rule = frequencies(geometric(10_000.0, 16))
    given = np.asarray(turns(jnp.asarray(positions)[None, :, None], rule), np.float64)[0]
    exact = np.outer(positions.astype(np.float64), rule.inv_freq / (2 * np.pi))
    assert np.abs((given - exact) - np.round(given - exact)).max() < 1e-5


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotation_against_complex_numbers(pairing):
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 10)), rng.uniform(0, 50, size=(2, 5, 1)).astype(np.float32)
    rule = frequencies(geometric(100.0, 8), pairing, factor=1.25)
    first, second = (slice(0, 4), slice(4, 8)) if pairing == "half" else (slice(0, 8, 2), slice(1, 8, 2))
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * positions[:, :, None] * rule.inv_freq) * 1.25
    expected = x.copy()
    expected[..., first], expected[..., second] = turned.real, turned.imag
    np.testing.assert_allclose(rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), rule), expected, atol=1e-5)


@pytest.mark.parametrize("shift", [16, 1000, 100_000])
def test_logits_depend_on_distance_alone(shift):
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 8, 1, 32)), jnp.float32) for _ in range(2))
    rule, positions = Rope().frequencies(32, 8), jnp.arange(8, dtype=jnp.float32)[None, :, None]

    def logits(offset):
        a, b = rotate(q, positions + offset, rule), rotate(k, positions + offset, rule)
        return jnp.einsum("bthd,bshd->bts", a, b)

    np.testing.assert_allclose(logits(shift), logits(0), atol=2e-5)


def test_axes_drive_their_own_channels():
    x = jnp.ones((1, 1, 1, 4))
    rule = Frequencies(inv_freq=np.ones(2), axis=np.asarray([1, 0], np.int32))
    got = rotate(x, jnp.asarray([[[0.0, np.pi / 2]]]), rule)[0, 0, 0]
    np.testing.assert_allclose(got, [-1, 1, 1, 1], atol=1e-6)  # pair 0 turns a quarter by axis 1, pair 1 stays


def test_nothing_turns_at_position_zero():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 3, 2, 6)), jnp.float32)
    rule = frequencies(geometric(100.0, 4), factor=1.5)
    got = rotate(x, jnp.zeros((1, 3, 1)), rule)
    np.testing.assert_array_equal(got, np.concatenate([1.5 * x[..., :4], x[..., 4:]], axis=-1))
