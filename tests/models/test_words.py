"""What tells parameters apart: one number however they are held, another of other ones; tables of other ones are refused."""

import zlib

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.critical import Critical
from lcx.cache.scorers.q_filters import QFilters
from lcx.models.decoder import rebuild
from lcx.models.light import light
from lcx.models.words import words
from lcx.parallel.mesh import MeshSpec
from lcx.spec import SpecError, edit, edits
from lcx.training.checkpoint import load_model
from lcx.training.run_folder import read_trained
from lcx.training.shipped import run_folder
from tests.inference.test_calibration import MODEL
from tests.inference.test_sharded_generation import shared_out


def cached(**cache):
    return edit(MODEL, "pattern[0].mixer.cache", KVCache(**cache))


@pytest.fixture(scope="module")
def model():
    return MODEL.build(rngs=nnx.Rngs(0))


def by_hand(model):
    """In NumPy, from bits: the nearest bfloat16, of two the even one."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
        keys = [str(key.key) for key in path]
        matrices = {"/".join(keys): leaf}
        if keys[0] == "slots":
            matrices = {"/".join([str(n), *keys[2:]]): matrix for n, matrix in enumerate(leaf)}
        for name, matrix in matrices.items():
            bits = np.asarray(matrix).reshape(-1).view(np.uint32).astype(np.uint64)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) + np.arange(bits.size, dtype=np.uint64) * 0x9E3779B1
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
                x %= 2**32
                x = (x ^ (x >> shift)) * factor
            total += int((x % 2**32).sum()) * (zlib.crc32(name.encode()) | 1)
    return total % 2**32


def test_one_number_however_parameters_are_held(model):
    found = words(model)
    assert found == by_hand(model)
    assert words(light(rebuild(model, edit(MODEL, "compute", "bfloat16")))) == found
    with jax.set_mesh(MeshSpec(fsdp=2, tensor=2).build(jax.devices()[:4])):
        assert words(shared_out(model, jax.sharding.get_mesh())) == found
    changed = nnx.clone(model)
    changed.embedding[...] = changed.embedding[...].at[3, 5].multiply(1.01)
    assert words(changed) != found


def test_the_order_of_layers_is_seen_however_they_are_divided(model):
    turned, divided = nnx.clone(model), edits(MODEL, [("pattern", MODEL.pattern * 2), ("periods", 1)]).build(rngs=nnx.Rngs(0))
    held = nnx.to_pure_dict(nnx.state(model))
    state = nnx.state(turned)
    nnx.replace_by_pure_dict(state, held | {"slots": jax.tree.map(lambda x: x[::-1], held["slots"])})
    nnx.update(turned, state)
    assert words(turned) != words(model)
    state = nnx.state(divided)
    slots = {n: jax.tree.map(lambda x, n=n: x[n : n + 1], held["slots"][0]) for n in range(2)}
    nnx.replace_by_pure_dict(state, held | {"slots": slots})
    nnx.update(divided, state)
    assert words(divided) == words(model)


def test_tables_of_other_parameters_are_refused(model, tmp_path):
    mine, other, silent = (str(tmp_path / f"{name}.npz") for name in ("mine", "other", "silent"))
    made = {"gates": np.ones((2, 2)), "directions": np.ones((2, 2, 8))}
    np.savez(mine, model=np.uint32(words(model)), **made)
    np.savez(other, model=np.uint32(words(model) ^ 1), **made)
    np.savez(silent, **made)
    of = lambda file: Evict(score=Critical(of=QFilters(directions=file)), keep=0.5)
    rebuild(model, cached(policy=of(mine)))
    place = r"model\.pattern\[0\]\.mixer\.cache\.policy\."
    with pytest.raises(SpecError, match=place + r"score\.of\.directions = .*other\.npz': was measured on another model"):
        rebuild(model, cached(policy=of(other)))
    with pytest.raises(SpecError, match=place + r"gates = .*silent\.npz': does not say of which model it is"):
        rebuild(model, cached(policy=DuoAttention(gates=silent)))


def test_tables_of_another_shipped_model_are_refused():
    folder = run_folder("reader")
    spec = lambda name: edit(
        read_trained(folder).model, "pattern[0].mixer.cache", KVCache(keys="raw", codec=KVQuant(calibration=name))
    )
    load_model(folder, spec("reader"))
    with pytest.raises(SpecError, match=r"codec\.calibration = 'reader_2k': was measured .*: expected 'reader' or a file"):
        load_model(folder, spec("reader_2k"))
