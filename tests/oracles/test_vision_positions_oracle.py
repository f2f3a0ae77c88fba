"""Positions of texts with images and video, and FAR's bias, are those of authors' code and of transformers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import vision_positions as oracle

from lcx.positions.flexrope import FlexRope
from lcx.positions.visual import DiagonalPositions, FramePositions, Grid, MRopePositions, Text, V2PEPositions
from pallas_kernels.tile_attention.tokens import Tokens, distance

RULES = {
    "qwen2": MRopePositions(following="rows and columns"),
    "qwen2_max": MRopePositions(),
    "video_rope": DiagonalPositions(gammas=(2.0,)),
    "hope_0.75": DiagonalPositions(gammas=(0.75,)),
    "hope_1.5": DiagonalPositions(gammas=(1.5,)),
}


@pytest.fixture(scope="module")
def held():
    with np.load(Path(__file__).parent / "golden" / "vision_positions.npz") as found:
        return dict(found)


def parts_of(spans):
    """A block stands between two marks, which are text."""
    found = []
    for span in spans:
        found += [Text(span)] if isinstance(span, int) else [Text(1), Grid(*span[1:]), Text(1)]
    return found


@pytest.mark.parametrize("n", range(len(oracle.ROWS)))
@pytest.mark.parametrize("name", RULES)
def test_rows(held, name, n):
    placed = RULES[name].place(parts_of(oracle.ROWS[n]))
    np.testing.assert_allclose(placed.positions.T, held[f"{n}/{name}"], atol=1e-6)
    if name != "qwen2":  # there the generated token goes on behind all axes, though text goes on behind rows and columns
        assert placed.following == pytest.approx(held[f"{n}/{name}/next"])


@pytest.mark.parametrize("n", range(len(oracle.ROWS)))
def test_seconds_between_frames(held, n):
    """Two positions a second; images have one frame."""
    rule = MRopePositions(time_step=2 * oracle.SECONDS, following="rows and columns")
    np.testing.assert_allclose(rule.place(parts_of(oracle.ROWS[n])).positions.T, held[f"{n}/qwen2_5"], atol=1e-6)


@pytest.mark.parametrize("stride", [1, 16, 64, 256])
def test_v2pe(held, stride):
    parts = [Text(3)]
    for tiles in oracle.TILES:
        parts += [Text(1), Grid(tiles, 16, 16), Text(3)]
    found = V2PEPositions(strides=(stride,)).place(parts).positions[:, 0]
    np.testing.assert_allclose(found, held[f"v2pe/{stride}"], atol=1e-5)


def test_far(held):
    """Three axes, and the bias that the distance of two frames takes from a logit; later frames are not seen."""
    ids = FramePositions().place([Grid(4, 2, 3)]).positions
    np.testing.assert_array_equal(ids, held["far/ids"])
    rule, frame = FlexRope(slope=oracle.SLOPE), ids[:, 0].astype(int)
    tokens = Tokens(*(jnp.asarray(frame, jnp.int32),) * 4)
    bias = -rule.slopes(1)[0] * distance(tokens.rows(), tokens.columns(), rule.along)
    seen = frame[None] <= frame[:, None]
    np.testing.assert_allclose(np.where(seen, bias, -np.inf), held["far/mask"], atol=1e-6)
