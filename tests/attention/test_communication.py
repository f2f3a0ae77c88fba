"""Every way for queries to meet keys on other devices equals the dense reference, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from infos import info, random_info
from jax.sharding import PartitionSpec

from lcx.attention.all_gather import AllGather
from lcx.attention.mask import Causal, Chunk, Sink, Window, tokens_of
from lcx.attention.ring import Ring, _journey, hops
from lcx.attention.sharded import sharded_attend
from lcx.attention.ulysses import RingUlysses, Ulysses
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.alibi import ALiBi
from lcx.positions.flexrope import FlexRope
from pallas_kernels.tile_attention import reference

CONTEXT = MeshSpec(context=8), Rules()
SMALL = MeshSpec(data=2, context=4), Rules()
TWO_AXES = MeshSpec(fsdp=2, context=4), Rules(batch=("data",), sequence=("fsdp", "context"))
HEADS = MeshSpec(context=4, tensor=2), Rules()
WAYS = {
    "all-gather over 8": (AllGather(), CONTEXT),
    "all-gather over 2 x 4": (AllGather(), TWO_AXES),
    "ring of 8": (Ring(), CONTEXT),
    "ring of 4, two groups": (Ring(), SMALL),
    "ring of 4, heads apart": (Ring(), HEADS),
    "ring of 2 around rings of 4": (Ring(), TWO_AXES),
    "all-to-all over 4": (Ulysses(), SMALL),
    "all-to-all over 2 x 4": (Ulysses(), TWO_AXES),
    "ring of 2 of all-to-alls over 4": (RingUlysses(), TWO_AXES),
}
MASKS = {"causal": Causal(), "window": Window(size=5), "sink or window": Sink(size=2) | Window(size=6), "chunk": Chunk(size=8)}


def compiled(way, mask, softcap=None, bias=None):
    communication, (mesh, rules) = way

    @jax.jit
    def run(q, k, v, info, d_out, d_lse):
        options = {"rules": rules, "communication": communication, "mask": mask, "scale": 0.3, "softcap": softcap, "bias": bias}
        (out, lse), pull = jax.vjp(lambda q, k, v: sharded_attend(q, k, v, info, info, **options), q, k, v)
        return out, lse, *pull((d_out, jnp.where(lse == -jnp.inf, 0, d_lse)))

    def on_mesh(*given):
        with jax.set_mesh(mesh.build()):
            return run(*given)

    return on_mesh


def dense(mask, softcap=None, bias=None):
    @jax.jit
    def run(q, k, v, info, d_out, d_lse):
        slopes = None if bias is None else bias.decay(q.shape[2]).bias(q)
        form = functools.partial(reference.forward, mask=mask, scale=0.3, softcap=softcap, bias=slopes)
        tokens = tokens_of(info)
        (out, lse), pull = jax.vjp(lambda q, k, v: form(q, k, v, tokens, tokens), q, k, v)
        return out, lse, *pull((d_out, jnp.where(lse == -jnp.inf, 0, d_lse)))

    return run


def given(seed, kind, B=2, T=48, H=8, K=2, D=8):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, D))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    cotangents = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, H, D), (B, T, H)))
    return q, k, v, random_info(rng, B, T, kind), *cotangents


def compare(got, expected, tolerance=1e-5):
    for name, value, other in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        largest = np.abs(other[np.isfinite(other)]).max(initial=0)
        np.testing.assert_allclose(value, other, rtol=0, atol=tolerance * largest, err_msg=name)


def cases():
    """Every way with every mask; in the suite each way and each mask once or twice."""
    for n, way in enumerate(WAYS):
        for m, mask in enumerate(MASKS):
            yield pytest.param(way, mask, marks=pytest.mark.slow if (n + m) % len(MASKS) else (), id=f"{way}, {mask}")


@pytest.mark.parametrize("way, mask", list(cases()))
def test_every_way_equals_the_reference(way, mask):
    softcap = 3.0 if mask == "sink or window" else None
    run, expected = compiled(WAYS[way], MASKS[mask], softcap), dense(MASKS[mask], softcap)
    for seed, kind in enumerate(("packed", "special", "mixed")):
        inputs = given(seed, kind)
        compare(run(*inputs), expected(*inputs))


OWN_HEADS = ("ring of 4, heads apart", "all-to-all over 2 x 4", "ring of 2 of all-to-alls over 4")


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way in OWN_HEADS[:2] else pytest.mark.slow) for way in WAYS])
def test_every_device_has_the_slopes_of_its_heads(way):
    bias = ALiBi() if way in OWN_HEADS else FlexRope(slope=0.1)
    run, expected = compiled(WAYS[way], Causal(), bias=bias), dense(Causal(), bias=bias)
    for seed, kind in enumerate(("packed", "special", "mixed")):
        inputs = given(seed, kind)
        compare(run(*inputs), expected(*inputs))


def whole_rows(length, document, layout=slice(None)):
    """One row of documents of `document` tokens."""
    place = np.arange(length)[layout]
    return info((place % document)[None], (1 + place // document)[None])


@pytest.mark.parametrize(
    "mask, row, expected",
    [
        (Causal(), whole_rows(64, 64), (7, 0)),
        (Causal(), whole_rows(64, 8), (0, 0)),
        (Causal(), whole_rows(64, 16), (1, 0)),
        (Causal(), whole_rows(64, 20), (2, 0)),
        (Window(size=9), whole_rows(64, 64), (1, 0)),
        (Window(size=10), whole_rows(64, 64), (2, 0)),
        (Window(size=2) | Sink(size=1), whole_rows(64, 64), (7, 0)),
        (Window(size=5), whole_rows(64, 64, np.arange(64)[::-1]), (0, 1)),
    ],
    ids=["one document", "a document a shard", "two shards", "uneven", "window", "wider", "sink", "backward"],
)
def test_keys_travel_no_farther_than_somebody_sees_them(mask, row, expected):
    """Rows of 64 tokens over a ring of 8."""
    tokens, spec = tokens_of(row), PartitionSpec(None, "context")

    def local(tokens):
        return hops(mask, tokens, tokens, "context", ("context",))

    with jax.set_mesh(MeshSpec(context=8).build()):
        run = jax.shard_map(local, in_specs=(spec,), out_specs=PartitionSpec(), check_vma=False)
        assert tuple(map(int, jax.jit(run)(tokens))) == expected


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_the_journey_visits_what_is_needed_with_the_fewest_hops(size):
    for bits in range(1 << size):
        needed = np.asarray([bits >> i & 1 for i in range(size)], bool)
        forward, backward = map(int, _journey(jnp.asarray(needed)))
        visited = {*range(forward + 1), *(size - hop for hop in range(1, backward + 1))}
        wanted = {i for i in range(1, size) if needed[i]}
        assert wanted <= visited
        fewest = min(
            max((i for i in wanted if i <= cut), default=0) + max((size - i for i in wanted if i > cut), default=0)
            for cut in range(size)
        )
        assert forward + backward == fewest


@pytest.mark.parametrize("communication", [Ring(), AllGather(), Ulysses()], ids=str)
@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda q, k, v: (q, k[:, :16], v[:, :16]), "disagree with infos"),
        (lambda q, k, v: (q, k, v[:, :16]), "disagree with infos"),
        (lambda q, k, v: (q, k, v[:, :, :1]), "disagree with infos"),
        (lambda q, k, v: (q[:, :, :3], k, v), "3 query heads are not a multiple of 2 key heads"),
        (lambda q, k, v: (q, k.astype(jnp.bfloat16), v), "expected one dtype"),
    ],
    ids=["keys", "values", "heads of values", "heads", "dtypes"],
)
def test_arrays_that_disagree_are_refused_on_a_mesh_too(communication, cut, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    own = info(np.arange(32)[None], np.ones((1, 32)))
    q, k, v = cut(jnp.ones((1, 32, 4, 8)), jnp.ones((1, 32, 2, 8)), jnp.ones((1, 32, 2, 8)))
    with jax.set_mesh(MeshSpec(context=4).build()), pytest.raises(ValueError, match=said):
        sharded_attend(q, k, v, own, own, rules=Rules(), communication=communication, mask=Causal(), scale=1.0)


def test_what_does_not_divide_over_a_mesh_is_named(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def call(T, H, K, communication):
        own = info(np.arange(T)[None], np.ones((1, T)))
        q, k = jnp.ones((1, T, H, 8)), jnp.ones((1, T, K, 8))
        return sharded_attend(q, k, k, own, own, rules=Rules(), communication=communication, mask=Causal(), scale=1.0)

    with jax.set_mesh(MeshSpec(context=4, tensor=2).build()):
        with pytest.raises(ValueError, match="30 tokens of q over 4 devices: expected a multiple"):
            call(30, 4, 2, Ring())
        with pytest.raises(ValueError, match="3 heads of q over 2 devices: expected a multiple"):
            call(32, 3, 1, Ring())
        with pytest.raises(ValueError, match=r"attend: Ulysses\(\): it shares out 2 query heads over 4 devices"):
            call(32, 4, 2, Ulysses())
        with pytest.raises(ValueError, match=r"communication = 'ring': expected a Communication, such as Ring\(\)"):
            call(32, 4, 2, "ring")
