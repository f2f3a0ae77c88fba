"""Codecs: what codes stand for, packed bit for bit, and what attention finds behind them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.cache.codecs.codec import Codec, bits_of
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import Keys, KVQuant, Values, outliers_of
from lcx.cache.codecs.plain import Plain
from lcx.cache.codecs.scaled import Fp8, Int8, widened
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.parts import parts
from lcx.spec import SpecError
from pallas_kernels.quantized_attention.packing import PLANES, pack, unpack

EXAMPLES = [(f"{cls.__name__}-{n}", spec) for cls in parts(Codec) for n, spec in enumerate(cls.examples())]


def numbers(shape=(2, 3, 64, 8), seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * rng.lognormal(size=shape[-1:]) + rng.normal(size=shape[-1:]), jnp.float32)


@pytest.mark.parametrize("bits", PLANES)
def test_packing_gives_every_code_back(bits):
    codes = jnp.asarray(np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 96, 5)), jnp.uint8)
    planes = pack(codes, bits)
    np.testing.assert_array_equal(unpack(planes, bits), codes)
    assert 8 * sum(x.nbytes for x in planes) == bits * codes.size


def test_a_word_holds_what_the_text_says():
    """3 bits of the 32 tokens of one channel: bit field j of word r is token 2 j + r of the plane of 2."""
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 8, (32, 1)), jnp.uint8)
    low, high = (np.asarray(x)[:, 0].astype(np.uint64) for x in pack(codes, 3))
    flat = np.asarray(codes)[:, 0].astype(np.uint64)
    assert low.tolist() == [sum(int(flat[2 * j + r] & 3) << (2 * j) for j in range(16)) for r in range(2)]
    assert high.tolist() == [sum(int(flat[j] >> 2) << j for j in range(32))]


@pytest.mark.parametrize("tokens, bits", [(33, 2), (32, 5)])
def test_what_cannot_be_packed_is_refused(tokens, bits):
    with pytest.raises(ValueError, match="expected a multiple of 32"):
        pack(jnp.zeros((tokens, 4), jnp.uint8), bits)


@pytest.mark.parametrize("codec", [spec for _, spec in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_loose_codes_are_the_codes(codec):
    """Any tokens taken out of a block and put in another stand for what they stood for, where a token's code is its own."""
    x, order = numbers(), np.random.default_rng(1).permutation(64)
    for side, (coder, tables) in enumerate(zip((codec.keys, codec.values), codec.tables(0, 3, 8, 8), strict=True)):
        tables = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), tables)
        codes = coder.encode(x, tables)
        loose = coder.loosened(codes, tables)
        np.testing.assert_array_equal(coder.value(loose, tables), coder.decode(codes, tables))
        again = coder.tightened(jax.tree.map(lambda leaf: leaf[:, :, order], loose), tables)
        wanted = np.asarray(coder.decode(codes, tables))[:, :, order]
        regroups = isinstance(codec, KIVI) and side == 0
        error = np.abs(np.asarray(coder.decode(again, tables)) - wanted).max()
        assert error < (2.0 if regroups else 1e-6), error


@pytest.mark.parametrize(
    "codec, most",
    [
        (Plain(), 0.0),
        (Int8(), 0.008),
        (Fp8(), 0.07),
        (IntGroups(bits=8, group=8), 0.004),
        (IntGroups(group=4), 0.07),
        (KIVI(bits=4), 0.07),
    ],
)
def test_codes_are_near_what_they_stand_for(codec, most):
    x = numbers()
    for coder in (codec.keys, codec.values):
        found = coder.decode(coder.encode(x))
        assert np.abs(found - x).max() <= most * np.abs(x).max()


def test_uniform_groups_equal_hand_worked_numbers():
    """0, 1, 2, 6 in 2 bits: steps of 2 from 0, so 0, 0 or 2, 2, 6; a group of one value has no range and is exact."""
    coder = IntGroups(bits=2, group=4).values
    x = jnp.broadcast_to(jnp.asarray([0.0, 1.5, 2.0, 6.0, 3.0, 3.0, 3.0, 3.0]), (1, 1, 32, 8))
    np.testing.assert_array_equal(coder.decode(coder.encode(x))[0, 0, 0], [0, 2, 2, 6, 3, 3, 3, 3])


def test_keys_of_kivi_are_grouped_along_tokens():
    """A channel with an offset of 1,000 costs its neighbours nothing: groups are of one channel."""
    x = numbers().at[..., 3].add(1000.0)
    keys, values = KIVI(bits=4), IntGroups(bits=4, group=8)
    error = lambda coder: np.abs(np.asarray(coder.decode(coder.encode(x)) - x))[..., [0, 1, 2, 4, 5, 6, 7]].max()
    assert error(keys.keys) < 1.0 < 10 < error(values.values)


def test_bits_are_what_the_arrays_take():
    x = numbers((1, 2, 128, 128))
    taken = lambda coder: bits_of(coder.encode(x), x.size)
    assert taken(Plain().keys) == 32
    assert taken(Int8().keys) == taken(Fp8().keys) == 8 + 32 / 128
    assert taken(IntGroups().keys) == 4 + 32 / 32
    assert taken(KIVI().keys) == taken(KIVI().values) == 2 + 32 / 32
    assert taken(IntGroups(bits=3, group=128).values) == 3 + 32 / 128


def test_every_float_of_eight_bits_is_widened():
    codes = jnp.arange(256, dtype=jnp.uint8).view(jnp.float8_e4m3fn)
    known = ~np.isnan(np.asarray(codes.astype(jnp.float32)))
    np.testing.assert_array_equal(np.asarray(widened(codes))[known], np.asarray(codes.astype(jnp.float32))[known])


@pytest.fixture(scope="module")
def golden():
    """What authors' quantizers make of the same numbers (tests/oracles/quantizers.py)."""
    with np.load(Path(__file__).parents[1] / "oracles" / "golden" / "quantizers.npz") as file:
        return {name: file[name] for name in file.files}


def test_kivi_equals_the_authors(golden):
    """They unpack to float16, here scales are held in it: a code at the edge may fall to the other side."""
    codec, x = KIVI(bits=2, group=32), jnp.asarray(golden["x"])
    values = IntGroups(bits=2, group=16).values
    for coder, name in ((codec.keys, "kivi/keys"), (values, "kivi/values")):
        found, wanted = np.asarray(coder.decode(coder.encode(x))), golden[name]
        near = np.abs(found - wanted) <= 1e-3 + 2e-3 * np.abs(golden["x"]).max(axis=-1, keepdims=True)
        assert near.mean() > 0.985
        step = np.abs(np.asarray(x) - wanted).max()
        assert np.abs(found - wanted).max() < 2.1 * step


def kvquant_tables(golden, scale=1.0, shift=0.0):
    by_head = lambda name: jnp.asarray(golden[f"kvquant/{name}"].reshape(1, 2, 32))
    codebook = jnp.broadcast_to(jnp.asarray(golden["kvquant/codebook"]), (1, 2, 8))
    norm = {"scale": jnp.full((1, 2), scale), "shift": jnp.full((1, 2), shift)}
    return {"upper": by_head("upper"), "lower": by_head("lower"), "codebook": codebook} | norm


@pytest.mark.parametrize("name, outliers, norm", [("keys", 0.02, ()), ("normed", 0.02, (1.1, 0.02)), ("plain", 0.0, ())])
def test_keys_of_kvquant_equal_the_authors(name, outliers, norm, golden):
    coder, tables = Keys(3, 0.3 if outliers else 0.0), kvquant_tables(golden, *norm)  # room for all outliers of a token
    x = jnp.asarray(golden["x"])
    found = np.moveaxis(np.asarray(coder.decode(coder.encode(x, tables), tables))[0], 0, 1).reshape(64, 64)
    np.testing.assert_allclose(found, golden[f"kvquant/{name}"], atol=0.02, rtol=6e-4)  # outliers in half precision


def test_values_of_kvquant_equal_the_authors(golden):
    coder, tables = Values(3, 0.02), kvquant_tables(golden)
    x = jnp.asarray(golden["x"])
    found = np.asarray(coder.decode(coder.encode(x, tables), tables))[0, 0]
    near = np.abs(found - golden["kvquant/values"]) <= 0.02 + 1e-3 * np.abs(golden["kvquant/values"])
    assert near.mean() > 0.99  # ranges are held in half precision: a number between two codes may take the other


def test_outliers_are_as_many_as_the_percentiles_cut_off():
    """21 on each side of 4,096, as the authors cap them; 1 of 128."""
    assert [outliers_of(0.01, n) for n in (4096, 128, 32)] == [21, 1, 1] and outliers_of(0.0, 128) == 0


def test_tables_of_another_model_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", **{"raw/0.01/upper": np.zeros((2, 3, 8)), "raw/0.01/lower": np.zeros((2, 3, 8))})
    codec = KVQuant(calibration=str(tmp_path / "t.npz"), codebook="uniform")
    with pytest.raises(SpecError, match="expected tables of this model"):
        codec.tables(0, 4, 8, 8)
    with pytest.raises(SpecError, match=r"outliers = 0\.05: expected one that"):
        KVQuant(calibration=str(tmp_path / "t.npz"), codebook="uniform", outliers=0.05).tables(0, 3, 8, 8)
    with pytest.raises(
        SpecError, match=r"expected a file of experiments\.calibrate, a model.s folder with kvquant.npz, or a shipped model"
    ):
        KVQuant(calibration="nowhere").tables(0, 3, 8, 8)
    with pytest.raises(SpecError, match="beside a learned codebook"):
        KVQuant()


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "d.npz", directions=np.ones((1, 3, 8)))
    (tmp_path / "g.json").write_text('{"gates": 1}')
    with pytest.raises(SpecError, match=r"calibration = .*experiments\.calibrate --method=KVQuant.* not direct"):
        KVQuant(calibration=str(tmp_path / "d.npz")).tables(0, 3, 8, 8)
    with pytest.raises(SpecError, match=r"gates = .*g\.json': expected rows of numbers, layers by key heads"):
        DuoAttention(gates=str(tmp_path / "g.json")).tables(0, 3, 8)
