"""`attend` under a distance plan gives the attention of the authors' code: SelfExtend, ReRoPE, ChunkLlama, DPE.

Measured, the largest difference is 5e-7.
"""

import functools
from pathlib import Path

import distance_plans as authors
import jax
import numpy as np
import pytest

from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.batch import causal_info
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


@pytest.mark.parametrize("name", PLANS)
def test_golden_attention(name):
    plan, growth = PLANS[name]
    with np.load(Path(__file__).parent / "golden" / "distance_plans.npz") as held:
        q, k, v, expected = (held[key] for key in ("q", "k", "v", name))
    info = causal_info(np.ones(q.shape[:2], np.int32))
    scaled = q if growth is None else q * growth.scale(info.index)[..., None, None]
    distances = Distances(plan, Rope(base=authors.BASE), authors.DIM, authors.LENGTH)
    given = {"mask": Causal(), "scale": authors.DIM**-0.5, "distances": distances}
    out, _ = jax.jit(functools.partial(attend, **given))(scaled, k, v, info, info)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
