"""What is measured of heads: directions are those of a singular value decomposition, gates those of kvpress."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.q_filters import QFilters
from lcx.inference.generate import generate
from lcx.inference.head_statistics import gates, statistics
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.models.decoder import rebuild
from lcx.parallel.mesh import MeshSpec
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.spec import SpecError, edit
from tests.inference.test_calibration import MODEL
from tests.inference.test_sharded_generation import shared_out

ROWS = np.random.default_rng(0).integers(0, 64, (3, 24)).tolist()


@pytest.fixture(scope="module")
def model():
    return MODEL.build(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def made(model):
    return statistics(model, ROWS, span=20)


def test_directions_are_singular_vectors_of_rotated_queries(model, made):
    """Of the first layer, whose queries are a product of the normed embedding, with the sign of their sum."""
    mixer = jax.tree.map(lambda x: x[0], model.slots[0])
    x = mixer.norms[0](model.embedding[...][jnp.asarray(ROWS)])
    q = jnp.einsum("btm,mhd->bthd", x, mixer.mixer.query[...], precision="highest")
    places = jnp.broadcast_to(jnp.arange(24.0)[None, :, None], (3, 24, 1))
    q = np.asarray(rotate(q, places, Rope().frequencies(8, 24)), np.float64).reshape(-1, 4, 8)
    found = []
    for h in range(4):
        u = np.linalg.svd(q[:, h], full_matrices=False)[2][0]
        found.append(u * np.sign(q[:, h].sum(axis=0) @ u))
    assert made["directions"].shape == (2, 2, 8) and made["gates"].shape == (2, 2)
    np.testing.assert_allclose(made["directions"][0], np.reshape(found, (2, 2, 8)).mean(axis=1), atol=1e-4)


def test_gates_are_those_of_kvpress():
    with np.load(Path(__file__).parents[1] / "oracles" / "golden" / "presses.npz") as golden:
        q, k = (golden[name].mean(axis=1) for name in ("q", "k"))
        found = gates(q, k, Rope().frequencies(8, 40), scale=8**-0.5, span=40)
        np.testing.assert_allclose(found, golden["gates/early"], atol=1e-5)


@pytest.mark.slow
def test_caches_read_what_was_measured(model, made, tmp_path):
    """With all tokens kept a model says what it says without; another model's are refused."""
    np.savez(tmp_path / "m.npz", **made)
    file = str(tmp_path / "m.npz")
    filters, duo = Evict(score=QFilters(directions=file), keep=1.0), DuoAttention(gates=file)
    cached = rebuild(model, edit(MODEL, "pattern[0].mixer.cache", KVCache(policy=filters)))
    found, wanted = (generate(one, [ROWS[0]], max_new=2)[0] for one in (cached, model))
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)
    assert duo.tables(0, 2, 8).shape == (2,) and duo.streams().sum() == 2
    for policy in (filters, duo):
        with pytest.raises(SpecError, match="of layer 2 of this model"):
            policy.tables(2, 2, 8)
        with pytest.raises(SpecError, match="of layer 0 of this model"):
            policy.tables(0, 3, 8)
    with pytest.raises(SpecError, match=r"a model's folder with qfilters\.npz, or a shipped model: reader"):
        QFilters(directions="nowhere").tables(0, 2, 8)


def test_on_a_mesh_as_on_one_device(model, made):
    """Of three texts, which four devices do not share out."""
    with jax.set_mesh(MeshSpec(data=4, tensor=2).build(jax.devices()[:8])):
        found = statistics(shared_out(model, jax.sharding.get_mesh()), ROWS, span=20)
    for name in made:
        np.testing.assert_allclose(found[name], made[name], atol=2e-5)


def test_other_mixers_are_refused(model):
    spec = edit(MODEL, "pattern", (edit(MODEL.pattern[0], "mixer", GatedDeltaNet(heads=2, head_dim=8)),))
    with pytest.raises(SpecError, match="expected plain attention"):
        statistics(spec.build(rngs=nnx.Rngs(0)), ROWS)
