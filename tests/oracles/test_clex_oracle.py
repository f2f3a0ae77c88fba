"""CLEX's frequencies and training positions are those of its authors' code.

Found: 3e-7 relative of the code told float64 (tanh), 1e-6 (silu).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.positions.clex import CLEX
from lcx.positions.clex_positions import CLEXPositions


@pytest.fixture(scope="module")
def held():
    with np.load(Path(__file__).parent / "golden" / "clex.npz") as found:
        return dict(found)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_frequencies(held, activation):
    module = CLEX(original_length=24, largest=4, activation=activation).build(16, rngs=nnx.Rngs(0))
    solve = jax.jit(lambda module: module().inv_freq)
    untrained = solve(module)
    module.up[...], module.down[...] = jnp.asarray(held["up"]), jnp.asarray(held["down"])
    trained = solve(module)
    for t in (1, 2, 3, 4):
        (row,) = np.flatnonzero(held["times"] == t)
        np.testing.assert_allclose(trained[t - 1], held[f"{activation}/exact"][row], rtol=3e-6)
        np.testing.assert_allclose(untrained[t - 1], held[f"{activation}/zero"][row], rtol=2e-7)


def test_positions(held):
    """With the numbers that the code drew; where its last position falls below the one before, ours stays level."""
    level = 0
    for wanted, t, window in zip(held["positions"], held["t"], held["trained"], strict=True):
        together = max(1, 24 // int(window))

        class Drawn:
            def integers(self, *_, drawn=int(t), **__):
                return drawn

            def choice(self, *_, drawn=wanted, together=together, **__):
                return np.rint(drawn[1:-1] * together).astype(int) - 1

        rule = CLEXPositions(original_length=int(window), largest=16)
        found, length = rule.placed(24, Drawn())
        assert length == int(t) * int(window)
        np.testing.assert_allclose(found, np.maximum.accumulate(wanted), rtol=1e-6)
        level += wanted[-1] < wanted[-2]
    assert 0 < level < len(held["t"])
