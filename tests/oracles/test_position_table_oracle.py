"""Rows of a position table that LongEmbed reads for documents of many lengths."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import text_positions as authors

from lcx.models.position_table import PositionTable


@pytest.fixture(scope="module")
def held():
    with np.load(Path(__file__).parent / "golden" / "text_positions.npz") as found:
        return dict(found)


@pytest.mark.parametrize(
    ("mode", "reading", "factor"),
    [("recurrent", "recurrent", 1), ("group", "grouped", 1), ("interpolate", "interpolated", authors.FACTOR)],
)
def test_rows(held, mode, reading, factor):
    """The interpolated table is counted in old rows here, in new ones there."""
    spec = PositionTable(rows=authors.ROWS, reading=reading, factor=factor)
    for tokens in authors.DOCUMENTS:
        places = jnp.arange(tokens, dtype=jnp.float32)[None]
        row, steps = spec.places(places, jnp.full((1, tokens), tokens))
        np.testing.assert_array_equal((row * factor + steps)[0], held[f"tables/{mode}/{tokens}"])
