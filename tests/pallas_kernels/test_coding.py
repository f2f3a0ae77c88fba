"""Codes by the kernel for TPUs, interpreted: bit by bit those that XLA makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.cache.codecs import groups, kvquant, scaled
from pallas_kernels.quantized_attention import coding, coding_tpu
from pallas_kernels.quantized_attention.half import bits_of_float, halves_of

CODECS = (
    scaled.Int8(),
    scaled.Fp8(),
    groups.IntGroups(),
    groups.IntGroups(bits=3, group=128),
    groups.IntGroups(bits=1, group=64),
    groups.KIVI(),
    kvquant.KVQuant(codebook="uniform"),
    kvquant.KVQuant(codebook="uniform", bits=2, outliers=0.1),
    kvquant.KVQuant(codebook="uniform", bits=4, outliers=0.0),
)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_codes_as_xla_does(codec, monkeypatch):
    random = np.random.default_rng(0)
    x = random.standard_t(3, size=(1, 2, 1024, 128)).round(1)  # among them alike ones, which outliers are chosen of
    x[:, :, 100] = 0
    tables = jax.tree.map(lambda x: jnp.asarray(x)[None], codec.tables(0, 2, 128, 128))

    def by_kernel(how, x, *known):
        assert coding_tpu.taken(how, x)
        return coding_tpu.coded(how, x, *known, interpret=True)

    for coder, known in zip((codec.keys, codec.values), tables, strict=True):
        given = jnp.asarray(x, jnp.bfloat16)
        wanted, loose = coder.encode(given, known), coder.tightened(coder.loose(given, known), known)
        with monkeypatch.context() as patched:
            for module in (groups, kvquant, scaled):
                patched.setattr(module, "coded", by_kernel)
            found = coder.encode(given, known)
        for made in (found, loose):
            for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_heads_wider_than_a_register_are_packed_in_a_second_pass():
    how = groups.IntGroups(bits=3).keys.coding
    for tokens in (256, 1152):  # the second are no tiles to pack, XLA does it
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, tokens, 256)), jnp.float32)
        assert coding_tpu.taken(how, x) and not coding_tpu.taken(how, x[:, :, :100])
        found, wanted = coding_tpu.coded(how, x, interpret=True), coding.coded(how, x)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_half_precision_by_integers():
    """All that it has, and between any two of them what is near either, or as near to both."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    numbers = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(halves_of(jnp.asarray(bits)), numbers)
    ordered = np.sort(numbers)
    between = (ordered[1:] + ordered[:-1]) / 2
    x = np.concatenate([numbers, between, np.nextafter(between, np.inf), np.nextafter(between, -np.inf)]).astype(np.float32)
    np.testing.assert_array_equal(bits_of_float(jnp.asarray(x)), x.astype(np.float16).view(np.uint16))
    assert np.isnan(halves_of(bits_of_float(jnp.asarray([np.nan, -np.nan], jnp.float32)))).all()
