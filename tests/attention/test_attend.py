"""attend, merge and mass against float64 loops, and the folds that everything longer is made of."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from infos import info, random_info

from lcx.attention.attend import attend, choose
from lcx.attention.mask import Beyond, Causal, Chunk, Hide, Sink, Window, Within, tokens_of
from lcx.attention.mass import mass
from lcx.attention.merge import merge
from lcx.attention.ring import Ring
from lcx.attention.sharded import sharded_attend
from lcx.batch import TokenInfo
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.alibi import ALiBi
from lcx.positions.flexrope import FlexRope

B, T, S, H, K, D, E = 2, 11, 17, 4, 2, 8, 6
MASK = Sink(size=2) | (Window(size=7) & Hide(query_role=1, key_role=0))
IDENTITY = (jnp.zeros((B, T, H, E)), jnp.full((B, T, H), -jnp.inf))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, E)))
    return q, k, v, random_info(rng, B, T, "special"), random_info(rng, B, S, "special")


def loops(q, k, v, q_info, k_info, mask, scale, softcap=None, bias=None):
    """(out, lse, probabilities) in float64, one query row and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    seen = np.asarray(mask.visible(tokens_of(q_info).rows(), tokens_of(k_info).columns()))
    out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
    probabilities = np.zeros((*q.shape[:3], k.shape[1]))
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, t])
        if len(keys) == 0:
            continue
        head = h // (q.shape[2] // k.shape[2])
        s = k[b, keys, head] @ q[b, t, h] * scale
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        if bias is not None:
            away = abs(np.asarray(getattr(q_info, bias.along))[b, t] - np.asarray(getattr(k_info, bias.along))[b, keys])
            s = s - bias.slopes(q.shape[2])[h] * away
        lse[b, t, h] = s.max() + np.log(np.exp(s - s.max()).sum())
        probabilities[b, t, h, keys] = np.exp(s - lse[b, t, h])
        out[b, t, h] = probabilities[b, t, h, keys] @ v[b, keys, head]
    return out, lse, probabilities


@pytest.mark.parametrize("backend", ["reference", "xla", "auto"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mask", [Causal(), MASK, Chunk(size=5)])
def test_attend_equals_float64_loops(case, mask, softcap, backend):
    out, lse = attend(*case, mask=mask, scale=0.7, softcap=softcap, backend=backend)
    expected_out, expected_lse, _ = loops(*case, mask, 0.7, softcap)
    assert np.isneginf(expected_lse).any() and np.isfinite(expected_lse).any()
    np.testing.assert_allclose(out, expected_out, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6)


@pytest.mark.parametrize("bias", [ALiBi(), FlexRope(slope=0.3)])
def test_a_bias_equals_float64_loops(case, bias):
    out, lse = attend(*case, mask=MASK, scale=0.7, bias=bias)
    expected_out, expected_lse, _ = loops(*case, MASK, 0.7, bias=bias)
    np.testing.assert_allclose(out, expected_out, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6)


def test_gradient_equals_finite_differences(case):
    q, k, v, q_info, k_info = case
    weights = [np.random.default_rng(1).normal(size=s) for s in ((B, T, H, E), (B, T, H))]

    def scalar(out, lse, np=jnp):
        return (out * weights[0]).sum() + np.where(np.isneginf(lse), 0, np.where(np.isneginf(lse), 0, lse) * weights[1]).sum()

    gradient = jax.grad(lambda *a: scalar(*attend(*a, q_info, k_info, mask=MASK, scale=0.7)), (0, 1, 2))(q, k, v)
    rng, h = np.random.default_rng(2), 1e-5
    for place, exact in enumerate(gradient):
        for _ in range(6):
            at = tuple(rng.integers(0, n) for n in exact.shape)
            sides = []
            for sign in (h, -h):
                moved = [np.asarray(x, np.float64) for x in (q, k, v)]
                moved[place][at] += sign
                sides.append(float(scalar(*loops(*moved, q_info, k_info, MASK, 0.7)[:2], np)))
            assert exact[at] == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-5, rel=1e-4)


def test_splitting_the_keys_anywhere_changes_nothing(case):
    q, k, v, q_info, k_info = case
    whole = attend(*case, mask=MASK, scale=0.7)
    part = lambda a, b: attend(q, k[:, a:b], v[:, a:b], q_info, k_info.take(slice(a, b)), mask=MASK, scale=0.7)
    parts = [part(0, 5), part(5, 6), part(6, 17)]
    left, right = merge(merge(parts[0], parts[1]), parts[2]), merge(parts[0], merge(parts[1], parts[2]))
    swapped = merge(parts[2], merge(IDENTITY, merge(parts[1], parts[0])))
    for got in (left, right, swapped):
        for value, expected in zip(got, whole, strict=True):
            np.testing.assert_allclose(value, expected, atol=2e-6)


def test_distance_regions_merge_to_the_whole(case):
    near, far = (attend(*case, mask=m, scale=0.7) for m in (Within(size=3), Beyond(size=3)))
    for value, expected in zip(merge(near, far), attend(*case, mask=Causal(), scale=0.7), strict=True):
        np.testing.assert_allclose(value, expected, atol=2e-6)


def test_merge_is_safe_at_the_identity():
    part = (jnp.ones((3, 2)), jnp.asarray([0.5, -jnp.inf, 40.0]))
    empty = (jnp.zeros((3, 2)), jnp.full(3, -jnp.inf))
    for got in (merge(part, empty), merge(empty, part)):
        np.testing.assert_array_equal(got[1], part[1])
        np.testing.assert_array_equal(got[0], jnp.where(part[1][:, None] == -jnp.inf, 0, part[0]))
    total = lambda a, b: sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in merge(a, b))
    for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(part, empty)):
        assert np.isfinite(leaf).all()


def test_key_order_changes_nothing(case):
    q, k, v, q_info, k_info = case
    order = np.random.default_rng(4).permutation(S)
    moved = jax.tree.map(lambda leaf: leaf[:, order], (k, v, k_info))
    for value, expected in zip(
        attend(q, *moved[:2], q_info, moved[2], mask=MASK, scale=0.7), attend(*case, mask=MASK, scale=0.7), strict=True
    ):
        np.testing.assert_allclose(value, expected, atol=2e-6)


@pytest.mark.parametrize("softcap, bias", [(None, None), (1.5, None), (None, ALiBi())])
def test_mass_equals_the_dense_probabilities(case, softcap, bias):
    q, k, _, q_info, k_info = case
    rows = jnp.asarray([0, 3, 4, 10])
    _, lse = attend(*case, mask=MASK, scale=0.7, softcap=softcap, bias=bias)
    got = mass(q, k, lse, q_info, k_info, mask=MASK, scale=0.7, rows=rows, softcap=softcap, bias=bias)
    dense = loops(*case, MASK, 0.7, softcap, bias)[2][:, np.asarray(rows)]
    np.testing.assert_allclose(got, dense.reshape(B, 4, K, H // K, S).sum(axis=(1, 3)), atol=2e-6)


@pytest.mark.slow
def test_mass_over_many_keys_and_its_gradient():
    rng = np.random.default_rng(0)
    n = 1100  # three chunks of keys, the last of them short
    own = info(np.arange(n)[None], np.ones((1, n)))
    q, k = (jnp.asarray(rng.normal(size=(1, n, 2, 4)), jnp.float32) for _ in range(2))
    rows, weights = jnp.asarray([5, 600, 1099]), jnp.asarray(rng.normal(size=(1, 2, n)), jnp.float32)

    def through_mass(q, k):
        _, lse = attend(q, k, k, own, own, mask=Causal(), scale=0.5)
        return (mass(q, k, lse, own, own, mask=Causal(), scale=0.5, rows=rows) * weights).sum()

    def dense(q, k):
        scores = jnp.einsum("bthd,bshd->bhts", q[:, rows], k, precision="highest") * 0.5
        seen = jnp.arange(n)[None, :] <= rows[:, None]
        return (jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).sum(axis=2) * weights).sum()

    (value, gradient), (other, others) = (jax.value_and_grad(f, (0, 1))(q, k) for f in (through_mass, dense))
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for a, b in zip(gradient, others, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_close(case, dtype):
    """float16 is the XLA form's alone: the kernels refuse it."""
    q, k, v, q_info, k_info = case
    narrow = [x.astype(dtype) for x in (q, k, v)]
    wide = [x.astype(jnp.float32) for x in narrow]
    got = attend(*narrow, q_info, k_info, mask=MASK, scale=0.7)
    for value, expected in zip(got, attend(*wide, q_info, k_info, mask=MASK, scale=0.7), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, atol=2e-2)


def test_documents_below_reader_are_documents():
    """Which no causal_info of given numbers makes; in more than a tile."""
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(1, 1200, 2, 16)), jnp.float32) for _ in range(3))
    index = np.r_[np.arange(700), np.arange(500)][None]
    found = [
        attend(q, k, v, *[info(index, np.r_[[first] * 700, [1] * 500][None])] * 2, mask=Causal(), scale=0.3)
        for first in (-5, 2)
    ]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_memory_is_linear_in_length():
    def temporaries(length):
        own = info(np.arange(length)[None], np.ones((1, length)))
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v, own: attend(q, k, v, own, own, mask=Causal(), scale=1.0)[0].sum()
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, own).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 2.6 * temporaries(8192)


def test_an_info_of_two_lengths_is_refused(case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    q, k, v, q_info, k_info = case
    with pytest.raises(ValueError, match=r"attend: k_info has .*'order': .*: expected one \[rows, tokens\]"):
        attend(q, k, v, q_info, dataclasses.replace(k_info, order=k_info.order[:, 1:]), mask=Causal(), scale=1.0)


def test_what_disagrees_is_refused(case):
    q, k, v, q_info, k_info = case
    options = {"mask": Causal(), "scale": 1.0}
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key heads"):
        attend(q[:, :, :3], k, v, q_info, k_info, **options)
    with pytest.raises(ValueError, match="disagree with infos"):
        attend(
            q,
            k,
            v,
            q_info,
            TokenInfo(**{f: getattr(k_info, f)[:, :5] for f in ("index", "order", "positions", "segments")}),
            **options,
        )


@pytest.mark.parametrize("lse", [-89.0, -3000.0, 3000.0])
def test_merge_is_safe_at_the_identity_for_any_logits(lse):
    part, nothing = (jnp.ones((1, 2)), jnp.asarray([lse])), (jnp.zeros((1, 2)), jnp.asarray([-jnp.inf]))
    for sides in (lambda a: merge(a, nothing), lambda a: merge(nothing, a)):
        value = lambda a, sides=sides: sides(a)[0].sum() + sides(a)[1].sum()
        d_out, d_lse = jax.grad(value)(part)
        np.testing.assert_array_equal(d_out, np.ones((1, 2)))
        np.testing.assert_array_equal(d_lse, [1.0])


@pytest.mark.parametrize("backend", ["reference", "xla", "auto"])
def test_a_row_that_sees_nothing_gives_no_gradient_whatever_its_cotangent(backend):
    """`where(lse == -inf, 0, lse ** 2)` has the cotangent 0 * inf = NaN there."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 4, 2, 8)), jnp.float32) for _ in range(3))
    row = info([[0, 1, 2, 0]], [[1, 1, 1, 0]])

    def loss(q, k, v):
        out, lse = attend(q, k, v, row, row, mask=Causal(), scale=0.3, backend=backend)
        return out.sum() + jnp.where(lse == -jnp.inf, 0, lse**2).sum()

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()


def test_rows_of_queries_and_keys_must_agree(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(rows, 4, 2, 8)), jnp.float32) for rows in (2, 1))
    with pytest.raises(ValueError, match="attend: 2 rows of queries, 1 of keys"):
        attend(q, k, k, info([[0, 1, 2, 3]] * 2, [[1] * 4] * 2), info([[0, 1, 2, 3]], [[1] * 4]), mask=Causal(), scale=1.0)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_a_backend_of_another_platform_is_refused(case, backend):
    with pytest.raises(ValueError, match=f"attend: backend = '{backend}': expected 'auto', 'xla' or 'reference' on cpu"):
        attend(*case, mask=Causal(), scale=1.0, backend=backend)


@pytest.mark.parametrize("target, form", [("cpu", "xla"), ("gpu", "gpu"), ("tpu", "tpu")])
def test_auto_takes_the_kernel_of_the_platform(monkeypatch, target, form):
    monkeypatch.setattr("lcx.attention.attend.platform", lambda: target)
    assert choose("auto") == form and choose("xla") == "xla"
    if form != "xla":
        assert choose(form) == form


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: {"q": q[0]}, r"q \(11, 4, 8\) float32: expected \[rows, tokens, heads, size\] in float32, bfloat16"),
        (lambda q, k, v: {"v": (v * 3).astype(jnp.int32)}, r"v \(2, 17, 2, 6\) int32: expected"),
        (lambda q, k, v: {"k": k.astype(jnp.bfloat16)}, "q, k, v of float32, bfloat16, float32: expected one dtype"),
        (lambda q, k, v: {"k": k[..., :4]}, "queries of size 8, keys of 4: expected one head size"),
        (lambda q, k, v: {"k_info": jnp.ones((2, 17))}, r"k_info is of type .*: expected a TokenInfo"),
        (lambda q, k, v: {"mask": "causal"}, r"mask = 'causal': expected a Mask, such as Causal\(\)"),
        (lambda q, k, v: {"mask": Causal}, r"mask = <class .*: expected a Mask"),
        (lambda q, k, v: {"scale": None}, "scale = None: expected a number"),
        (lambda q, k, v: {"softcap": math.inf}, "softcap = inf: expected a positive number or None"),
        (lambda q, k, v: {"softcap": "30"}, "softcap = '30': expected a positive number or None"),
        (lambda q, k, v: {"softcap": 0.0}, r"softcap = 0\.0: expected a positive number or None"),
        (lambda q, k, v: {"bias": 0.5}, r"bias = 0\.5: expected a LinearBias, such as ALiBi\(\), or None"),
        (lambda q, k, v: {"bias": ALiBi(), "softcap": 2.0}, r"bias = ALiBi\(\) with softcap = 2\.0: expected one of them"),
        (lambda q, k, v: {"q": q[:, :, :0]}, r"q \(2, 11, 0, 8\), k .*: expected at least one head and channel"),
        (lambda q, k, v: {"distances": 1}, "distances = 1: expected Distances of a plan, or None"),
        (lambda q, k, v: {"plan": 1}, "plan = 1: expected a BlockPlan, or None"),
    ],
)
def test_what_is_no_call_is_named(case, change, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = dict(zip(("q", "k", "v", "q_info", "k_info"), case, strict=True)) | {"mask": MASK, "scale": 1.0}
    with pytest.raises(ValueError, match=f"(attend: )?{said}"):
        attend(**given | change(*case[:3]))


def test_key_heads_that_lie_otherwise_than_queries_are_refused():
    q, k = jnp.ones((2, 16, 8, 8)), jnp.ones((2, 16, 4, 8))
    own = info(np.tile(np.arange(16), (2, 1)), np.ones((2, 16)))
    for heads, kv_heads in (((), ("tensor",)), (("tensor", "data"), ("data", "tensor")), (("tensor", "data"), ("tensor",))):
        rules = Rules(batch=("fsdp",), heads=heads, kv_heads=kv_heads)
        with (
            jax.set_mesh(MeshSpec(data=2, tensor=2).build()),
            pytest.raises(ValueError, match=r"rules share key heads out over"),
        ):
            sharded_attend(q, k, k, own, own, rules=rules, communication=Ring(), mask=Causal(), scale=1.0)


@pytest.mark.parametrize(
    ("axes", "rules", "said"),
    [
        (("data", "fsdp", "context", "tensor"), None, r"rules = None: expected Rules, such as Rules\(\)"),
        (("rows", "fsdp"), Rules(), "rules name context, data, tensor: expected axes of the mesh, rows, fsdp"),
    ],
)
def test_rules_that_are_not_of_the_mesh_are_refused(axes, rules, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    q, own = jnp.ones((2, 16, 4, 8)), info(np.tile(np.arange(16), (2, 1)), np.ones((2, 16)))
    mesh = jax.make_mesh((2, *(1,) * (len(axes) - 1)), axes, devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=f"attend: {said}"):
        sharded_attend(q, q, q, own, own, rules=rules, communication=Ring(), mask=Causal(), scale=1.0)


@pytest.mark.parametrize("rows, queries, keys", [(2, 0, 5), (2, 5, 0), (0, 5, 5)])
def test_no_tokens_find_nothing(rows, queries, keys):
    q, k = jnp.ones((rows, queries, 4, 8)), jnp.ones((rows, keys, 2, 8))
    infos = [info(np.tile(np.arange(T), (rows, 1)), np.ones((rows, T))) for T in (queries, keys)]

    def total(q, k):
        out, lse = attend(q, k, k[..., :6], *infos, mask=Window(size=3), scale=1.0)
        assert out.shape == (rows, queries, 4, 6) and not out.any() and (lse == -jnp.inf).all()
        return out.sum()

    with jax.disable_jit():
        dq, dk = jax.grad(total, argnums=(0, 1))(q, k)
    assert dq.shape == q.shape and dk.shape == k.shape and not dq.any() and not dk.any()
