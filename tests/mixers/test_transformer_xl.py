"""Transformer-XL equals its formulas written out, in value and gradient, in rows, in pieces and on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import weights_of
from flax import nnx
from meshes import equal_on_a_mesh

from lcx.attention.mask import Window
from lcx.attention.ring import Ring
from lcx.batch import Batch, causal_info
from lcx.cache.dense import DenseCache
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited
from lcx.mixers.transformer_xl import TransformerXL, _Behind
from lcx.norms import RMSNorm
from lcx.parallel.rules import Rules
from lcx.positions.alibi import ALiBi
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.query_scale import LogN
from lcx.positions.rerope import ReRoPE
from lcx.positions.rope import Rope
from lcx.spec import SpecError, edit, edits
from pallas_kernels.tile_attention.tokens import Tokens, tiles

WIDTH, SEGMENT, MEMORY = 8, 4, 6
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 4, "backend": "reference"}
PLAIN = TransformerXL(attention=Attention(**HEADS, rope="none", bias="qkv"), segment=SEGMENT, memory=MEMORY)
CASES = {
    "plain": PLAIN,
    "clamp": edit(PLAIN, "clamp", 3),
    "same length": edit(PLAIN, "same_length", True),
    "no memory": edit(PLAIN, "memory", 0),
    "rope": TransformerXL(attention=Attention(**HEADS), segment=SEGMENT, memory=3, relative="rope"),
}


def module_of(spec, seed=3, **inherited):
    """With biases and sinks that are not 0."""
    given = {"width": WIDTH, "depth": 1, "rope": Rope(), "compute": "float32", "rules": Rules()} | inherited
    module = spec.build(Inherited(**given), rngs=nnx.Rngs(0))
    draw = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        if "bias" in path[-1] or path[-1] == "sinks":
            getattr(module, path[-1])[...] = jnp.asarray(draw.normal(size=leaf.shape), jnp.float32)
    return module


def batch_of(segments, start=None):
    return Batch(tokens=jnp.zeros(np.shape(segments), jnp.int32), info=causal_info(np.asarray(segments), start))


def inputs(length, rows=1, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, length, WIDTH)), jnp.float32)


@jax.jit
def run(module, x, batch, state=None):
    return module(x, batch, state)[:2]


def sinusoids(n, width):
    angles = n * 10_000.0 ** (-2 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)])


def turned(y, n):
    """A head by RoPE, pairs of halves."""
    angles = n * 10_000.0 ** (-2 * np.arange(len(y) // 2) / len(y))
    a, b = np.split(y, 2)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)])


def written_out(spec, weights, x):
    """Of one document [T,M] in float64, pair by pair."""
    project = lambda name: np.einsum("tm,mhd->thd", x, weights[name]) + weights.get(f"{name}_bias", 0)
    q, k, v = map(project, ("query", "key", "value"))
    D, y = q.shape[-1], np.zeros_like(x)
    for i in range(len(x)):
        first = max(0, i // spec.segment * spec.segment - spec.memory)
        if spec.same_length:
            first = max(first, i - spec.memory + 1)
        for head in range(q.shape[1]):
            scores = []
            for j in range(first, i + 1):
                key = k[j, head // 2]
                if spec.relative == "rope":
                    scores.append(turned(q[i, head], i) @ turned(key, j))
                    continue
                n = i - j if spec.clamp is None else min(i - j, spec.clamp)
                place = np.einsum("m,md->d", sinusoids(n, x.shape[1]), weights["position"][:, head])
                scores.append(
                    (q[i, head] + weights["content_bias"][head]) @ key + (q[i, head] + weights["position_bias"][head]) @ place
                )
            share = np.exp(np.asarray(scores) / np.sqrt(D))
            y[i] += share @ v[first : i + 1, head // 2] / share.sum() @ weights["output"][head]
    return y


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_the_layer_equals_its_formulas(spec):
    """Two documents and padding."""
    module, x = module_of(spec), inputs(24)
    found = run(module, x, batch_of([[1] * 15 + [0] * 2 + [2] * 7]))[0][0]
    for places in (slice(0, 15), slice(17, 24)):
        wanted = written_out(spec, weights_of(module), np.asarray(x[0, places], np.float64))
        np.testing.assert_allclose(found[places], wanted, atol=5e-6)


def test_tokens_may_lie_in_any_order():
    module, x, batch = module_of(CASES["clamp"]), inputs(24), batch_of([[1] * 15 + [0] * 2 + [2] * 7])
    order = np.random.default_rng(0).permutation(24)
    mixed = jax.tree.map(lambda field: field[:, order], batch)
    np.testing.assert_allclose(run(module, x[:, order], mixed)[0], run(module, x, batch)[0][:, order], atol=2e-6)


def by_segments(module, x):
    """One document, a segment at a time: keys of a memory of inputs, without gradient, and of the segment."""
    spec, T, outs = module.recurrence, x.shape[1], []
    held = lambda name: getattr(module, name)[...]
    project = lambda name, x: jnp.einsum("btm,mhd->bthd", x, held(name)) + held(f"{name}_bias")
    for start in range(0, T, spec.segment):
        memory = jax.lax.stop_gradient(x[:, max(0, start - spec.memory) : start])
        own = x[:, start : start + spec.segment]
        both = jnp.concatenate([memory, own], axis=1)
        q, (k, v) = project("query", own), (jnp.repeat(project(name, both), 2, axis=2) for name in ("key", "value"))
        n = np.arange(own.shape[1])[:, None] + memory.shape[1] - np.arange(k.shape[1])
        far = np.minimum(n, spec.clamp or n.max())
        places = jnp.asarray(np.stack([[sinusoids(m, x.shape[2]) for m in row] for row in far]), jnp.float32)
        places = jnp.einsum("tsm,mhd->tshd", places, module.position[...])
        scores = jnp.einsum("bthd,bshd->bhts", q + module.content_bias[...], k)
        scores = scores + jnp.einsum("bthd,tshd->bhts", q + module.position_bias[...], places)
        seen = (n >= 0) & (n < (spec.memory if spec.same_length else n.max() + 1))
        share = jax.nn.softmax(jnp.where(seen, scores / np.sqrt(q.shape[-1]), -jnp.inf), axis=-1)
        outs.append(jnp.einsum("bhts,bshd,hdm->btm", share, v, module.output[...]))
    return jnp.concatenate(outs, axis=1)


@pytest.mark.parametrize("case", ["clamp", "same length"])
def test_gradients_are_those_of_the_segment_loop(case):
    module, x = module_of(CASES[case]), inputs(15, rows=2)
    batch = batch_of(np.ones((2, 15), np.int32))
    both = lambda form: jax.jit(jax.value_and_grad(lambda m, x: jnp.sin(form(m, x)).sum(), argnums=(0, 1)))
    found = both(lambda m, x: m(x, batch)[0])(module, x)
    wanted = both(by_segments)(module, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)


def test_nothing_of_a_gradient_reaches_earlier_segments():
    module, x, batch = module_of(CASES["rope"]), inputs(12), batch_of([[1] * 12])
    slope = jax.jit(jax.grad(lambda x: jnp.square(module(x, batch)[0][:, 8:]).sum()))(x)
    assert not slope[:, :8].any() and slope[:, 8:].all()


def test_distances_are_right_where_a_row_goes_on_far_in_a_document():
    module, x, segments = module_of(CASES["clamp"]), inputs(11), [[1] * 11]
    near, far = (run(module, x, batch_of(segments, np.asarray([start])))[0] for start in (0, 1 << 22))
    np.testing.assert_allclose(far, near, atol=1e-4)


WIDE = {
    "options": {"bias": "all", "qk_norm": RMSNorm(), "softcap": 3.0, "sinks": "learned", "persistent": 2},
    "scale": {"query_scale": LogN(original_length=4), "distance_bias": ALiBi(), "scale": 0.3, "rope": Rope(sections=(1, 1))},
    "length": {"rope": DynamicNTK(original_length=4, length_policy="growing"), "cache": DenseCache(keys="raw")},
}


@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE)
def test_a_memory_of_everything_is_plain_attention(options):
    """In rows and token by token, with what an attention may have beside heads."""
    attention = Attention(**HEADS, **options)
    plain, module = module_of(attention), module_of(TransformerXL(attention=attention, memory=64, segment=4, relative="rope"))
    x, segments = inputs(9, rows=2), np.ones((2, 9), np.int32)
    np.testing.assert_allclose(run(module, x, batch_of(segments))[0], run(plain, x, batch_of(segments))[0], atol=2e-6)
    before, state = plain.init_state(2, 9), module.init_state(2, 9)
    for t in range(0, 9, 3):
        info = causal_info(segments[:, :3], np.full(2, t), jnp.full((2, 3), t + 3))
        given = x[:, t : t + 3], Batch(tokens=jnp.zeros((2, 3), jnp.int32), info=info)
        wanted, before = run(plain, *given, before)
        found, state = run(module, *given, state)
        np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("case", ["clamp", "no memory", "rope"])
def test_a_state_holds_what_a_next_token_sees(case):
    """Chunks of more tokens than it holds, and of several documents; as many slots as a token at the end of a segment needs."""
    spec, x = CASES[case], inputs(40)
    module = module_of(spec)
    segments = np.asarray([[1] * 23 + [0] * 2 + [2] * 3 + [3] * 12])
    wanted = run(module, x, batch_of(segments))[0]
    state, at, index = module.init_state(1, 1000), 0, causal_info(segments).index
    assert state.store.k.shape[1] == spec.segment - 1 + spec.memory
    for size in (21, 1, 9, 8, 1):  # each in a row of 22, padding before and behind it
        row, part = np.zeros((1, 22), np.int32), slice(at, at + size)
        row[:, 1 : 1 + size] = segments[:, part]
        noise = inputs(22, seed=1).at[:, 1 : 1 + size].set(x[:, part])
        found, state = run(module, noise, batch_of(row, np.asarray(index[:, at])), state)
        np.testing.assert_allclose(found[:, 1 : 1 + size], wanted[:, part], atol=5e-6)
        at += size


def test_a_document_that_begins_again_sees_nothing_of_the_one_before():
    """All documents may be of segment 1, as in generation."""
    module, x, batch = module_of(PLAIN), inputs(5), batch_of([[1] * 3 + [0] * 2])
    _, state = run(module, inputs(5, seed=1), batch_of([[1] * 5]), module.init_state(1, 64))
    found, after = run(module, x, batch, state)
    wanted, _ = run(module, x, batch, module.init_state(1, 64))
    np.testing.assert_allclose(found[:, :3], wanted[:, :3], atol=5e-6)
    assert sorted(np.asarray(after.store.info.index)[np.asarray(after.store.info.segments) == 1]) == [0, 1, 2]


def test_what_a_state_does_not_hold_is_not_answered():
    """A document that goes on elsewhere than behind its last token; one that all see."""
    module, x = module_of(PLAIN), inputs(5)
    _, state = run(module, x, batch_of([[1] * 5]), module.init_state(1, 64))
    y, after = run(module, x, batch_of([[1] * 5], np.asarray([6])), state)
    assert np.isnan(y).all()
    assert np.isnan(run(module, x, batch_of([[1] * 5], np.asarray([11])), after)[0]).all()
    y, _ = run(module, x, batch_of([[-1] * 2 + [1] * 3]), module.init_state(1, 64))
    assert np.isnan(y).all()


def test_the_mask_of_a_memory():
    rng = np.random.default_rng(0)
    q, k = (Tokens(i := rng.integers(0, 40, (1, 24)).astype(np.int32), 0 * i, 0 * i + 1, 0 * i) for _ in range(2))
    for segment, memory in ((1, 1), (4, 6), (5, 3), (7, 14)):
        mask = _Behind(segment=segment, memory=memory)
        start = q.index[0, :, None] // segment * segment
        wanted = (k.index < start) & (k.index >= start - memory)
        assert (mask.visible(q.rows(), k.columns())[0] == wanted).all()
        low, high = mask.intervals(q.index[0])[0]
        assert (wanted == ((low <= k.index.T) & (high > k.index.T)).T).all()
        for size in (1, 4):
            may, must = mask.bounds(tiles(q, size).rows(), tiles(k, size).columns())
            cut = wanted.reshape(24 // size, size, 24 // size, size)
            assert (cut.any(axis=(1, 3)) <= may[0]).all() and (must[0] <= cut.all(axis=(1, 3))).all()
            assert size > 1 or ((may[0] == must[0]) & (may[0] == wanted)).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "clamp", "rope"])
def test_on_a_mesh(case):
    """Without biases: that of keys adds the same to all scores, so that its gradient is a rounding."""
    spec = edits(CASES[case], [("attention.backend", "auto"), ("attention.bias", "none")])
    x, batch = inputs(16, rows=2), batch_of([[1] * 9 + [2] * 7, [1] * 16])
    equal_on_a_mesh(module_of(spec, communication=Ring()), x, batch, 1e-5)


def test_what_does_not_combine_is_refused():
    heads = {"heads": 1, "kv_heads": 1, "head_dim": 4}
    for options, message in (
        ({"rope": "model"}, r"attention = .*expected one whose rope is 'none' beside relative = 'published'"),
        ({"mask": Window(size=2)}, r"attention = .*expected one whose mask is Causal\(\)"),
    ):
        with pytest.raises(SpecError, match=message):
            TransformerXL(attention=Attention(**heads, **{"rope": "none"} | options))
    with pytest.raises(SpecError, match=r"attention = .*expected one whose distances is None"):
        TransformerXL(attention=Attention(**heads, distances=ReRoPE(window=4)), relative="rope")
    for options, message in (
        ({"relative": "rope", "clamp": 3}, "clamp = 3: expected None beside relative = 'rope'"),
        ({"attention": Attention(**heads, rope="none", softcap=3.0), "clamp": 3}, "clamp = 3: expected None beside a softcap"),
        ({"memory": 0, "same_length": True}, "memory = 0: expected at least 1 token beside same_length"),
    ):
        with pytest.raises(SpecError, match=message):
            TransformerXL(**{"attention": Attention(**heads, rope="none")} | options)
    with pytest.raises(SpecError, match="relative = 'published': expected 'rope' in a model of odd width 7"):
        module_of(TransformerXL(attention=Attention(**heads, rope="none")), width=7)
