"""What rows have read goes to a folder and back: answers go on as if there had been no break, on another mesh too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.scaled import Fp8
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.budgets import Pyramid
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.windowkv import WindowKV
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.cache.scorers.observed import Observed
from lcx.cache.scorers.snapkv import SnapKV
from lcx.inference import saved
from lcx.inference.generate import answer, generate
from lcx.inference.reading import nothing_read, prefill
from lcx.inference.sampling import Sampling
from lcx.inference.saved import restore, save
from lcx.models.decoder import rebuild
from lcx.models.light import light
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.spec import SpecError, edit, edits
from tests.inference.test_cached_generation import MODEL
from tests.inference.test_sharded_generation import shared_out

PROMPTS = [list(range(7, 7 + n)) for n in (40, 9, 61)]
CACHES = {
    "dense": DenseCache(),
    "kivi": KVCache(codec=KIVI(group=8, residual=8)),
    "snap": KVCache(policy=Evict(score=SnapKV(window=4), keep=0.5, heads="adaptive")),
    "h2o, int4": KVCache(codec=IntGroups(group=8), policy=Evict(score=Observed(), keep=0.5, every=3)),
    "expected, fp8": KVCache(
        codec=Fp8(), policy=Evict(score=ExpectedAttention(ahead=8, sinks=1), keep=16, every=2, layers=Pyramid(beta=2.0))
    ),
    "chelsea": KVCache(policy=Chelsea(keep=16, every=2, chunk=4, sinks=1, recent=2)),
    "windows": KVCache(policy=WindowKV(keep=12, suffix=4, window=4, every=2, layers=Pyramid(beta=4.0, group=2))),
}
SIDES = {"upper": 1, "lower": -1}
DRAWN = Sampling(temperature=0.7)
MESHES = [MeshSpec(data=2, tensor=2), MeshSpec(data=4)]


@functools.cache
def model(cache, seed=0):
    spec = edits(MODEL, [("pattern[0].mixer.cache", cache), ("periods", 1 if cache.keys == "raw" else 2)])
    return spec.build(rngs=nnx.Rngs(seed))


def begun(model):
    """(answers of 4 tokens of 10, the rows after them)."""
    return answer(model, prefill(model, PROMPTS, 4, 10, 16), max_new=4, sampling=DRAWN)


def whole(first, model, read):
    rest, _ = answer(model, read, max_new=6, sampling=DRAWN, made=4)
    return [a.ids + b.ids for a, b in zip(first, rest, strict=True)], [
        a.logprobs + b.logprobs for a, b in zip(first, rest, strict=True)
    ]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """KVQuant with tables, those of a file."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("tables") / "t.npz"
    made = {f"{side}/0.01/3/codebook": np.sort(rng.uniform(-1, 1, (1, 8))) for side in ("raw", "values")}
    np.savez(path, **made, **{f"raw/0.01/{name}": sign * rng.uniform(1, 2, (1, 2, 8)) for name, sign in SIDES.items()})
    return KVCache(keys="raw", codec=KVQuant(calibration=str(path), bits=3))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("kvquant", *CACHES) if name != "windows"]


@pytest.mark.parametrize("name", ["windows", *SLOW])
def test_answers_go_on_behind_a_break(name, tmp_path, request):
    cached = model(request.getfixturevalue("calibrated") if name == "kvquant" else CACHES[name])
    wanted = generate(cached, PROMPTS, max_new=10, chunk=16, sampling=DRAWN)
    first, read = begun(cached)
    save(tmp_path / "read", cached, read)
    with pytest.raises(ValueError, match="max_new = 7: expected 1 to the 6 tokens that rows have room for"):
        answer(cached, read, max_new=7)
    ids, logprobs = whole(first, cached, restore(tmp_path / "read", cached))
    assert ids == [row.ids for row in wanted]
    np.testing.assert_array_equal(logprobs, [row.logprobs for row in wanted])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kivi", "h2o, int4", "expected, fp8", "chelsea", "windows"])
def test_and_on_another_mesh(name, tmp_path):
    cached = model(CACHES[name])
    wanted = generate(cached, PROMPTS, max_new=10, chunk=16, sampling=DRAWN)
    with jax.set_mesh(MESHES[0].build(jax.devices()[:4])):
        there = shared_out(cached, jax.sharding.get_mesh())
        first, read = begun(there)
        save(tmp_path / "read", there, read)
    with jax.set_mesh(MESHES[1].build(jax.devices()[:4])):
        there = shared_out(cached, jax.sharding.get_mesh())
        ids, logprobs = whole(first, there, restore(tmp_path / "read", there))
    assert ids == [row.ids for row in wanted]
    np.testing.assert_allclose(logprobs, [row.logprobs for row in wanted], atol=2e-5)


def test_what_is_of_another_model_is_refused(tmp_path):
    cached, path = model(CACHES["kivi"]), tmp_path / "read"
    read = nothing_read(cached, 2, 64, *(jnp.zeros(2, kind) for kind in ("int32", "float32", "int32")))
    save(path, cached, read)
    with pytest.raises(SpecError, match="exists already: expected a new folder"):
        save(path, cached, read)
    other = model(KVCache(codec=KIVI(group=8, residual=16)))
    with pytest.raises(SpecError, match=r"model\.pattern\[0\]\.mixer\.cache\.codec\.residual = 8: expected that, not 16"):
        restore(path, other)
    with pytest.raises(SpecError, match="read with other parameters"):
        restore(path, model(CACHES["kivi"], seed=1))
    with pytest.raises(SpecError, match=r"lcx\.inference\.saved wrote"):
        restore(tmp_path, cached)
    with jax.set_mesh(MeshSpec(context=3).build(jax.devices()[:3])):
        there = rebuild(cached, edit(cached.spec, "rules", Rules(sequence=(), slots=("context",))))
        with pytest.raises(SpecError, match=r"expected \(.*\), as slots lie on this mesh"):
            restore(path, there)


def test_a_light_model_reads_on_where_another_left(tmp_path):
    """And the other way round: they read alike. Not where they compute in another type."""
    whole = rebuild(model(CACHES["kivi"]), edit(model(CACHES["kivi"]).spec, "compute", "bfloat16"))
    read = nothing_read(whole, 2, 64, *(jnp.zeros(2, kind) for kind in ("int32", "float32", "int32")))
    for name, one, other in (("whole", whole, light(whole)), ("light", light(whole), whole)):
        save(tmp_path / name, one, read)
        restore(tmp_path / name, other)
    with pytest.raises(SpecError, match=r"read with model\.compute = 'bfloat16': expected that, not 'float32'"):
        restore(tmp_path / "whole", model(CACHES["kivi"]))
    other = edit(model(CACHES["kivi"]).spec, "compute", "bfloat16")
    with pytest.raises(SpecError, match="read with other parameters"):
        restore(tmp_path / "whole", light(rebuild(model(CACHES["kivi"], seed=1), other)))


def test_a_damaged_array_is_found(tmp_path, monkeypatch):
    cached, path = model(CACHES["kivi"]), tmp_path / "read"
    read = nothing_read(cached, 2, 64, *(jnp.zeros(2, kind) for kind in ("int32", "float32", "int32")))
    written = saved.ocp.args.StandardSave
    other = lambda arrays: written(arrays | {".seen": arrays[".seen"] + 1})
    monkeypatch.setattr(saved.ocp.args, "StandardSave", other)
    save(path, cached, read)
    with pytest.raises(SpecError, match=r"\.seen is not what was saved"):
        restore(path, cached)


def test_a_file_that_is_cut_is_named(tmp_path):
    cached, path = model(CACHES["kivi"]), tmp_path / "read"
    save(path, cached, nothing_read(cached, 2, 64, *(jnp.zeros(2, kind) for kind in ("int32", "float32", "int32"))))
    for item, file in (("read", next((path / "read/d").iterdir())), ("meta", path / "meta/metadata")):
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(SpecError, match=rf"read/{item}: cannot be read \(.*\); expected a whole folder as `save` wrote it"):
            restore(path, cached)
