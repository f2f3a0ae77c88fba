"""DPE with a choice of dimensions a layer and head: every pair of tokens and channels in float64, and how they are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.attention.ring import Ring
from lcx.attention.sharded import sharded_attend
from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.evaluation.key_dimensions import RANDOM, key_dimensions, main, random_dimensions
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.distance_plan import Distances
from lcx.positions.rope import Rope
from lcx.spec import SpecError, edit

T, H, K, D, L = 24, 4, 2, 8, 3
GROUPS, WINDOW = (2, 4), 4


def saved(tmp_path, chosen):
    path = str(tmp_path / f"chosen-{int(chosen.sum())}.npy")
    np.save(path, chosen)
    return DimensionGroups(groups=GROUPS, window=WINDOW, dimensions=path)


def inputs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(1, T, heads, D)), jnp.float32) for heads in (H, K, K))


def folded(plan, q, k, v, layer, run=attend, **options):
    info = causal_info(np.ones((1, T), np.int32))
    q = plan.chosen(q, jnp.int32(layer)) if plan.chooses else q
    distances = Distances(plan, Rope(), D, T)
    return run(q, k, v, info, info, mask=Causal(), scale=D**-0.5, distances=distances, **options)[0]


def by_hand(q, k, v, chosen):
    """Of one layer, float64; chosen [H, C]."""
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    pairs = D // 2
    theta = 1e4 ** -(np.arange(pairs) / pairs)
    sizes = np.repeat(GROUPS, pairs // len(GROUPS))
    out = np.zeros((T, H, D))
    for h in range(H):
        for i in range(T):
            scores = np.zeros(i + 1)
            for j in range(i + 1):
                far = i // sizes + WINDOW - WINDOW // sizes - j // sizes
                away = np.where(chosen[h], far, i - j) if i - j >= WINDOW else np.full(pairs, i - j)
                a, b, key = q[i, h, :pairs], q[i, h, pairs:], k[j, h // (H // K)]
                cosine, sine = np.cos(away * theta), np.sin(away * theta)
                scores[j] = ((a * cosine - b * sine) * key[:pairs] + (a * sine + b * cosine) * key[pairs:]).sum() * D**-0.5
            p = np.exp(scores - scores.max())
            out[i, h] = p / p.sum() @ v[: i + 1, h // (H // K)]
    return out


@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_every_pair_of_tokens_and_channels(tmp_path, layer):
    chosen = np.random.default_rng(1).random((L, H, D // 2)) < 0.5
    got = jax.jit(lambda *given: folded(saved(tmp_path, chosen), *given, layer))(*inputs())
    np.testing.assert_allclose(got[0], by_hand(*inputs(), chosen[layer]), atol=3e-6)


@pytest.mark.slow
def test_all_and_none(tmp_path):
    """All pairs is DPE as it is; none is plain rotation, in value and gradient."""
    everything = np.ones((L, H, D // 2), bool)
    loss = lambda plan: jax.jit(jax.value_and_grad(lambda given: jnp.sin(folded(plan, *given, 1)).sum()))(inputs())
    for chosen, other in ((everything, DimensionGroups(groups=GROUPS, window=WINDOW)), (~everything, None)):
        other = other or DimensionGroups(groups=(1, 1), window=1)
        got, wanted = loss(saved(tmp_path, chosen)), loss(other)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_a_ring_turns_them_too(tmp_path):
    plan = saved(tmp_path, np.random.default_rng(1).random((L, H, D // 2)) < 0.5)
    wanted = folded(plan, *inputs(), 1)
    with jax.set_mesh(MeshSpec(context=4).build()):
        got = jax.jit(lambda *given: folded(plan, *given, 1, sharded_attend, rules=Rules(), communication=Ring()))(*inputs())
    np.testing.assert_allclose(got, wanted, atol=2e-6)


def decoder(**mixer) -> Decoder:
    layer = Layer(mixer=Attention(heads=H, kv_heads=K, head_dim=D, **mixer), channel=GLU(hidden=16))
    return Decoder(vocab=32, width=16, pattern=(layer,), periods=L)


def test_pairs_that_carry_most_are_chosen(tmp_path):
    """A pair of one head and layer made large, another made small; the model then reads the file."""
    model = decoder().build(rngs=nnx.Rngs(0))
    query = model.slots[0].mixer.query
    query[...] = query[...].at[1, :, 3, jnp.array([2, 6])].multiply(20).at[2, :, 0, jnp.array([1, 5])].multiply(1e-3)
    tokens = np.random.default_rng(0).integers(0, 32, (2, T)).astype(np.int32)
    batch = Batch(tokens=tokens, info=causal_info(np.ones_like(tokens)))
    one, three = (key_dimensions(model, [batch, batch], count) for count in (1, 3))
    assert one.shape == (L, H, D // 2) and (one.sum(-1) == 1).all() and one[1, 3, 2]
    assert (three.sum(-1) == 3).all() and not three[2, 0, 1]
    chosen = rebuild(model, edit(decoder(), "pattern[0].mixer.distances", saved(tmp_path, three)))
    assert jnp.isfinite(jax.jit(lambda model: model(batch)[0])(chosen)).all()
    with pytest.raises(ValueError, match="count = 9: expected from 1 to the 4 pairs of a head"):
        key_dimensions(model, [batch], 9)


def test_what_does_not_fit_is_refused(tmp_path):
    plan = saved(tmp_path, np.ones((L, 2, D // 2), bool))
    with pytest.raises(SpecError, match=r"a choice for 3 layers of 4 heads of 4 pairs .*, not one of shape \(3, 2, 4\)"):
        plan.chosen(inputs()[0], jnp.int32(0))
    with pytest.raises(SpecError, match=r"expected a choice for 3 layers .*, not one of shape \(1, 4, 4\)"):
        mixer = Attention(heads=H, kv_heads=K, head_dim=D, distances=saved(tmp_path, np.ones((1, H, D // 2), bool)))
        edit(decoder(), "pattern[0].mixer", mixer).build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected queries in two halves, from the plan's `chosen`"):
        info = causal_info(np.ones((1, T), np.int32))
        attend(*inputs(), info, info, mask=Causal(), scale=1.0, distances=Distances(plan, Rope(), D, T))
    with pytest.raises(SpecError, match="expected no choice of dimensions beside a rope of part of a head"):
        mixer = Attention(heads=H, kv_heads=K, head_dim=D, distances=plan, rope=Rope(rotary=0.5))
        edit(decoder(), "pattern[0].mixer", mixer).build(rngs=nnx.Rngs(0))


def test_as_many_at_random():
    found = [random_dimensions((L, H, 8), 3, seed) for seed in (0, 0, 1)]
    assert all(chosen.dtype == bool and (chosen.sum(-1) == 3).all() for chosen in found)
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any() and len(np.unique(found[0].reshape(-1, 8), axis=0)) > 1


@pytest.mark.slow
def test_the_command_writes_what_a_plan_reads(tmp_path, capsys):
    main("copier", "8", str(tmp_path))
    for name in ("chosen", *(f"random-{seed}" for seed in range(RANDOM))):
        held = np.load(tmp_path / f"{name}.npy")
        assert held.dtype == bool and held.shape == (3, 3, 16) and (held.sum(-1) == 8).all()
    assert capsys.readouterr().out.count("\n") == 6
