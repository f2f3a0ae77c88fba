"""`attend` under a distance plan gives the attention of authors' code: SelfExtend one way and both, ReRoPE, ChunkLlama, DPE.

Measured, the largest difference is 5e-7.
"""

import functools
from pathlib import Path

import distance_plans as authors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.batch import TokenInfo, causal_info
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.distance_plan import Distances
from lcx.positions.dual_chunk import DualChunk
from lcx.positions.query_scale import LogN
from lcx.positions.rerope import ReRoPE
from lcx.positions.rope import Rope
from lcx.positions.self_extend import SelfExtend

GROWING = LogN(original_length=authors.TRAINED)
PLANS = {
    "self_extend": (SelfExtend(group=authors.GROUP, window=authors.WINDOW), None),
    "rerope": (ReRoPE(window=authors.WINDOW), GROWING),
    "leaky_rerope": (ReRoPE(window=authors.WINDOW, leak=float(authors.LEAK)), GROWING),
    "dual_chunk": (DualChunk(chunk=authors.CHUNK, clip=authors.CLIP), None),
    "dimension_groups": (DimensionGroups(groups=authors.GROUPS, window=authors.WINDOW), None),
}


@pytest.fixture(scope="module")
def held():
    with np.load(Path(__file__).parent / "golden" / "distance_plans.npz") as found:
        return dict(found)


def attention(plan, q, k, v, info):
    (_, length, _, dim) = q.shape
    given = {"mask": Causal(), "scale": dim**-0.5, "distances": Distances(plan, Rope(base=authors.BASE), dim, length)}
    return jax.jit(functools.partial(attend, **given))(q, k, v, info, info)[0]


@pytest.mark.parametrize("name", PLANS)
def test_golden_attention(held, name):
    plan, growth = PLANS[name]
    q, k, v = (held[key] for key in "qkv")
    info = causal_info(np.ones(q.shape[:2], np.int32))
    scaled = q if growth is None else q * growth.scale(info.index)[..., None, None]
    np.testing.assert_allclose(attention(plan, scaled, k, v, info), held[name], rtol=0, atol=2e-6)


def test_golden_attention_both_ways(held):
    q, k, v = (held[f"both_ways/{key}"] for key in "qkv")
    info = causal_info(np.ones(q.shape[:2], np.int32))
    info = TokenInfo(index=info.index, order=jnp.zeros_like(info.order), positions=info.positions, segments=info.segments)
    plan = SelfExtend(group=authors.GROUP, window=authors.BOTH_WINDOW, bidirectional=True)
    np.testing.assert_allclose(attention(plan, q, k, v, info), held["both_ways"], rtol=0, atol=2e-6)
