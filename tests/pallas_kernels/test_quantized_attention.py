"""The reference of quantised attention equals attention to what the codecs decode themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import described
from quantized_cases import CODECS, Case, close, made

from lcx.attention.mask import Causal, Sink, Window
from pallas_kernels.quantized_attention import op, reference
from pallas_kernels.quantized_attention.formats import ChannelGroups, TokenGroups, invalid, widened
from pallas_kernels.tile_attention import reference as dense
from pallas_kernels.tile_attention.tokens import Bias, Tokens


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("by_head", [False, True], ids=["tokens of all heads", "of each head"])
def test_equals_attention_to_decoded_slots(name, by_head):
    """Key heads are rows; NaN in empty slots is not seen."""
    case = Case(CODECS[name], S=384, T=5, mask=Window(size=300) | Sink(size=4), by_head=by_head)
    (plan, q, slots, q_tokens, slopes), (k, v) = made(case)
    got = reference.forward(plan, q, slots, q_tokens, slopes)
    close(got, rows(plan, q, slots, q_tokens, slopes, k, v), 3e-6)
    assert np.isneginf(got[1]).any() and not np.asarray(got[0])[np.isneginf(got[1])].any()


def test_slopes_soft_cap_and_counts():
    case = Case(CODECS["int8"], S=96, T=3, group=4, softcap=3.0, sloped=True)
    given, (k, v) = made(case)
    close(reference.forward(*given), rows(*given, k, v), 3e-6)
    plan, q, slots, q_tokens, slopes = given
    twice = slots._replace(extra=jnp.full(slots.k.scale.shape, np.log(2.0), jnp.float32))
    out, lse = reference.forward(plan, q, slots, q_tokens, slopes)
    more, later = reference.forward(plan, q, twice, q_tokens, slopes)
    close((more, later), (out, lse + np.log(2.0)), 1e-6)


@pytest.mark.parametrize(
    "rotary, pairing",
    [
        (64, "half"),
        (128, "interleaved"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((64, "interleaved"), (128, "half"))),
    ],
)
def test_raw_keys_are_turned(pairing, rotary):
    """As the rope turns them, and as partners of the queries' channels do."""
    case = Case(CODECS["kvquant 3"], S=96, T=2, rotary=rotary, pairing=pairing, tables=True)
    (plan, q, slots, q_tokens, slopes), (k, v) = made(case)
    first = np.arange(rotary // 2) if pairing == "half" else np.arange(0, rotary, 2)
    second = first + (rotary // 2 if pairing == "half" else 1)
    pairs = np.asarray(k[..., first] + 1j * k[..., second]) * np.asarray(slots.cosine + 1j * slots.sine)[:, None]
    turned = k.at[..., first].set(pairs.real).at[..., second].set(pairs.imag)
    got = reference.forward(plan, q, slots, q_tokens, slopes)
    close(got, rows(plan, q, slots, q_tokens, slopes, turned, v), 3e-6)
    wide = [widened(x, case.D, pairing, rest) for x, rest in ((slots.cosine, 1.0), (slots.sine, 0.0))]
    partner = reference.partners(q, rotary // 2, pairing)
    found = jnp.einsum("bthd,bsd->bths", q, k[:, 0] * wide[0]) + jnp.einsum("bthd,bsd->bths", partner, k[:, 0] * wide[1])
    np.testing.assert_allclose(found, jnp.einsum("bthd,bsd->bths", q, turned[:, 0]), atol=1e-3)


def test_tables_are_made_of_positions():
    """As in float64, nine hundred thousand positions away."""
    turning = made(Case(CODECS["int8"], S=96, rotary=64))[0][2].turning
    angle = np.asarray(turning.positions, np.float64)[..., None] * 500000.0 ** (-np.arange(32) / 32)
    for table, wanted in zip(turning.tables(), (np.cos(angle), np.sin(angle)), strict=True):
        np.testing.assert_allclose(table, 1.1 * wanted, atol=2e-5)
    given, _ = made(Case(CODECS["int8"], S=96, rotary=64))
    tables, _ = made(Case(CODECS["int8"], S=96, rotary=64, tables=True))
    close(reference.forward(*given), reference.forward(*tables), 1e-6)


def rows(plan, q, slots, q_tokens, slopes, k, v):
    """`tile_attention.reference` with a row for every key head, empty slots zero."""
    B, K, S, D = k.shape
    T, H = q.shape[1:3]
    by_head = lambda x: jnp.moveaxis(x.reshape(B, T, K, H // K, *x.shape[3:]), 2, 1).reshape(B * K, T, H // K, *x.shape[3:])
    k_tokens = Tokens(*(jnp.broadcast_to(x, (B, K, S)).reshape(-1, S) for x in slots.tokens))
    k_tokens = k_tokens._replace(segments=k_tokens.segments * (jnp.arange(S) < jnp.repeat(slots.used, K)[:, None]))
    out, lse = dense.forward(
        by_head(q),
        k.reshape(B * K, S, 1, D),
        v.reshape(B * K, S, 1, D),
        Tokens(*(jnp.repeat(x, K, axis=0) for x in q_tokens)),
        k_tokens,
        mask=plan.mask,
        scale=plan.scale,
        softcap=plan.softcap,
        bias=None if slopes is None else Bias(by_head(slopes), plan.along),
    )
    back = lambda x: jnp.moveaxis(x.reshape(B, K, T, H // K, *x.shape[3:]), 1, 2).reshape(B, T, H, *x.shape[3:])
    return back(out), back(lse)


def test_only_what_can_be_is_taken():
    (plan, q, slots, *_), _ = made(Case(CODECS["groups 4"], S=96))
    assert invalid(plan, q, slots) is None
    with_values = lambda form: invalid(type(plan)(plan.keys, form, Causal(), 1.0), q, slots)
    assert "groups of channels" in with_values(TokenGroups(4, 32))
    assert "divisor of 128" in with_values(ChannelGroups(4, 48))
    assert "2 key heads of 128" in invalid(plan, q[:, :, :3], slots)


def test_a_kernel_is_chosen_where_it_is_taken():
    """None says that the caller is to decode spans; a named form says why it does not take a call."""
    (plan, *given), _ = made(Case(CODECS["groups 4"], S=256))
    (_, narrow, small, *tokens), _ = made(Case(CODECS["groups 4"], S=96, D=64))
    assert op.chosen(plan, *given[:2]) is None and op.forward(plan, *given) is None  # on a CPU
    with described("NVIDIA H200"):
        assert op.chosen(plan, *given[:2]) == "gpu" and op.chosen(plan, given[0][:, :, :3], given[1]) is None
    close(op.forward(plan, *given, form="reference"), reference.forward(plan, *given), 0)
    with pytest.raises(ValueError, match="multiples of 128"):
        op.forward(plan, narrow, small, *tokens, form="tpu")
    with pytest.raises(ValueError, match="expected auto or one of reference, tpu, gpu"):
        op.forward(plan, *given, form="cuda")
