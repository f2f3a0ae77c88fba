"""`attend` with chosen chunks gives the attention of LongHeads' authors. Measured, the largest difference is 1.4e-7."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import long_heads as authors
import numpy as np

from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.batch import causal_info
from lcx.positions.distance_plan import Distances
from lcx.positions.long_heads import LongHeads
from lcx.positions.rope import Rope


def test_golden_attention():
    with np.load(Path(__file__).parent / "golden" / "long_heads.npz") as held:
        q, k, v = (jnp.asarray(held[name]) for name in "qkv")
        places, expected = held["places"], held["out"]
    info = causal_info(np.ones(q.shape[:2], np.int32))
    plan = LongHeads(chunk=authors.CHUNK, chunks=authors.SEEN // authors.CHUNK)
    distances = Distances(plan, Rope(base=authors.BASE), authors.DIM, authors.LENGTH)
    run = functools.partial(attend, mask=Causal(), scale=authors.DIM**-0.5, distances=distances)
    out, _ = jax.jit(run)(q, plan.held(q, k), v, info, info)
    np.testing.assert_allclose(out[0, places], expected, rtol=0, atol=2e-6)
