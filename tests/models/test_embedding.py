"""Look-up of sharded rows equals the look-up of a whole table in value and gradient, and the table stays where it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lcx.models.embedding import lookup
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules

V, M = 48, 16
SPREAD = Rules(batch=("data",), sequence=("fsdp", "context"), width=("fsdp", "context"))
MESHES = {
    "width over the rows' axis": (Rules(), MeshSpec(data=2, fsdp=2, tensor=2)),
    "width over rows and sequence": (Rules(width=("fsdp", "context")), MeshSpec(fsdp=2, context=4)),
    "width over the two axes of the sequence": (SPREAD, MeshSpec(fsdp=2, context=2, tensor=2)),
    "in the other order": (
        Rules(batch=("data",), sequence=("context", "fsdp"), width=("fsdp", "context")),
        MeshSpec(fsdp=2, context=2),
    ),
    "width on an axis without tokens": (Rules(width=("tensor", "fsdp"), vocab=()), MeshSpec(fsdp=2, tensor=4)),
    "a whole table": (Rules(width=(), vocab=()), MeshSpec(data=2, context=2)),
}


def run(table, tokens, slope, rules, compute):
    rows = lambda table: lookup(table, tokens, scale=3.0, rules=rules, compute=compute)
    return rows(table), jax.grad(lambda table: (rows(table) * slope).sum())(table)


@pytest.mark.parametrize("name", MESHES)
def test_equals_the_whole_table(name):
    rules, spec = MESHES[name]
    rng = np.random.default_rng(0)
    table, slope = rng.normal(size=(V, M)).astype(np.float32), rng.normal(size=(4, 8, M)).astype(np.float32)
    tokens = rng.integers(-1, V, (4, 8)).astype(np.int32)
    compute = "bfloat16" if "rows and sequence" in name else "float32"
    wanted = jnp.where((tokens >= 0)[..., None], 3 * table[tokens], 0).astype(compute)
    by_table = np.zeros_like(table)
    np.add.at(by_table, tokens[tokens >= 0], 3 * np.asarray(jnp.asarray(slope[tokens >= 0]).astype(compute), np.float32))
    mesh = spec.build()
    with jax.set_mesh(mesh):
        place = lambda x, *logical: jax.device_put(x, NamedSharding(mesh, rules.partition(logical)))
        given = place(table, "vocab", "width"), place(tokens, "batch", "sequence"), place(slope, "batch", "sequence", None)
        options = {"static_argnums": (3, 4), "out_shardings": (None, given[0].sharding)}
        compiled = jax.jit(run, **options).lower(*given, rules, compute).compile()
        rows, gradient = compiled(*given)
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_allclose(gradient, by_table, atol=1e-5)
    whole = re.compile(rf"f32\[({V}|{V // 2}),{M}\]\S* (all-|reduce-scatter)")
    assert bool(whole.search(compiled.as_text())) == (not rules.width)
