"""attend: the one attention call. Everything longer (rings, caches, regions, prefixes) is a fold of it by `merge`."""

import dataclasses
import functools
import logging
import math
import numbers
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcx.attention.chosen_chunks import ChosenChunks
from lcx.attention.mask import Causal, Mask, tokens_of
from lcx.attention.plan import BlockPlan, check_plan
from lcx.attention.planned import Planned
from lcx.attention.regions import Regions
from lcx.batch import TokenInfo
from lcx.positions.distance_plan import Distances
from lcx.positions.linear_bias import LinearBias
from pallas_kernels.target import platform
from pallas_kernels.tile_attention import op

Backend = Literal["auto", "reference", "xla", "tpu", "gpu"]
DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float16"))
KERNELS = ("tpu", "gpu")  # forms named after the platform that they are for


def attend(
    q: Float[Array, "B T H _"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_info: TokenInfo,
    k_info: TokenInfo,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: LinearBias | None = None,
    plan: BlockPlan | None = None,
    distances: Distances | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Attention of queries to keys: `(out f32, lse f32)`.

    Query head h reads key head h // (H/K). `lse` is the natural log of the sum of exponentials, after scale, bias and soft-cap.
    Rows that see nothing, as where there are no keys, give out = 0 and lse = -inf. Gradients accept a cotangent for `lse`.
    `auto` chooses a form in `choose` and logs it once; a named backend is mandatory. bias: falls with distance. plan: of the
    visible pairs only those that it lists. distances: q and k come raw, and are turned by the regions of a distance plan, which
    cover what an order by index shows, or, if the plan is `both_ways`, any order; where it chooses pairs of channels, q comes
    in two halves of a head each; where it reads the queries of keys, k holds them too (`DistancePlan.held`).

    Raises ValueError for what is no attention call (`check_call`), disagrees with the plan, or has arguments that no method
    combines: distances with a plan or a bias, a bias with a soft-cap.
    """
    check_call(q, k, v, q_info, k_info, mask=mask, scale=scale, softcap=softcap, bias=bias, distances=distances)
    options = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias, "distances": distances, "backend": backend}
    fold = local_fold(q, k, plan=plan, **options)
    if 0 in (q.size, k.size):
        return nothing_seen(q, v)
    plans = () if plan is None else (plan,)
    return op.attention(fold, q, k, v, tokens_of(q_info), tokens_of(k_info), *plans)


def nothing_seen(
    q: Float[Array, "B T H _"], v: Float[Array, "B S K E"]
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """What queries find where there is no key."""
    return jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)


def check_call(q, k, v, q_info, k_info, *, mask, scale, softcap, bias=None, distances=None) -> None:
    """Raises ValueError with the argument that is not what `attend` takes, or that disagrees with another."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if jnp.ndim(x) != 4 or jnp.asarray(x).dtype not in DTYPES:
            expected = f"expected [rows, tokens, heads, size] in {', '.join(map(str, DTYPES))}"
            raise ValueError(f"attend: {name} {jnp.shape(x)} {jnp.asarray(x).dtype}: {expected}")
    if len({jnp.asarray(x).dtype for x in (q, k, v)}) > 1:
        raise ValueError(f"attend: q, k, v of {q.dtype}, {k.dtype}, {v.dtype}: expected one dtype")
    for name, info in (("q_info", q_info), ("k_info", k_info)):
        if not isinstance(info, TokenInfo):
            expected = "expected a TokenInfo, such as causal_info(segments)"
            raise ValueError(f"attend: {name} is of type {type(info).__name__}: {expected}")
        held = {field.name: getattr(info, field.name) for field in dataclasses.fields(TokenInfo)}
        shapes = {field: np.shape(x)[:2] for field, x in held.items() if x is not None}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"attend: {name} has {shapes}: expected one [rows, tokens]")
    if not isinstance(mask, Mask):
        raise ValueError(f"attend: mask = {mask!r}: expected a Mask, such as Causal()")
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"attend: scale = {scale!r}: expected a number, such as head_dim ** -0.5")
    if softcap is not None and not (isinstance(softcap, numbers.Real) and 0 < softcap < math.inf):
        raise ValueError(f"attend: softcap = {softcap!r}: expected a positive number or None")
    if bias is not None and not isinstance(bias, LinearBias):
        raise ValueError(f"attend: bias = {bias!r}: expected a LinearBias, such as ALiBi(), or None")
    if bias is not None and softcap is not None:
        raise ValueError(
            f"attend: bias = {bias} with softcap = {softcap}: expected one of them; which comes first is not defined"
        )
    if 0 in (*q.shape[2:], *k.shape[2:], *v.shape[2:]):
        raise ValueError(f"attend: q {q.shape}, k {k.shape}, v {v.shape}: expected at least one head and channel of each")
    if distances is not None and not isinstance(distances, Distances):
        raise ValueError(f"attend: distances = {distances!r}: expected Distances of a plan, or None")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attend: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"attend: {q.shape[0]} rows of queries, {k.shape[0]} of keys")
    _check_sizes(q, k, v, mask, distances)
    if q.shape[:2] != q_info.shape or k.shape[:2] != k_info.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attend: q {q.shape}, k {k.shape}, v {v.shape} disagree with infos {q_info.shape}, {k_info.shape}")


def _check_sizes(q, k, v, mask, distances) -> None:
    (H, D), (K, found), plan = q.shape[2:], k.shape[2:], None if distances is None else distances.plan
    wanted, expected = D, "one head size"
    if plan is not None and plan.chooses:
        wanted, expected = D / 2, "queries in two halves, from the plan's `chosen`"
    if plan is not None and plan.reads_queries:
        wanted, expected = D * (1 + H // K), f"keys with {H // K} queries behind each, from the plan's `held`"
        if v.shape[3] != D:
            raise ValueError(f"attend: values of size {v.shape[3]} with {plan}: expected {D}, that of queries")
        if mask != Causal():
            raise ValueError(f"attend: mask = {mask} with {plan}: expected Causal(), of which it chooses a part")
    if found != wanted:
        raise ValueError(f"attend: queries of size {D}, keys of {found}: expected {expected}")


def local_fold(
    q: Float[Array, "B T H _"],
    k: Float[Array, "B S K D"],
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: LinearBias | None = None,
    plan: BlockPlan | None = None,
    distances: Distances | None = None,
    backend: Backend = "auto",
    heads: int | None = None,
    head_axes: tuple[str, ...] = (),
) -> op.Fold:
    """Attention on one device in the form that `choose` takes for these shapes; with a plan, a fold that takes it too.

    heads: of the whole call, which the mesh axes `head_axes` share out; by default those of q.
    """
    if distances is not None:
        for name, other in (("plan", plan), ("bias", bias)):
            if other is not None:
                raise ValueError(f"attend: {name} and distances: expected one of them")
        if distances.plan.reads_queries and backend in KERNELS:
            raise ValueError(f"attend: backend = {backend!r} with {distances.plan}: expected 'auto', 'xla' or 'reference'")
        fold = ChosenChunks if distances.plan.reads_queries else Regions
        return fold(choose(backend), mask, scale, softcap, distances)
    decay = None if bias is None else dataclasses.replace(bias.decay(heads or q.shape[2]), axes=head_axes)
    if plan is None:
        return op.Tiled(choose(backend), mask, scale, softcap, decay=decay)
    check_plan(plan, B=q.shape[0], T=q.shape[1], S=k.shape[1], H=q.shape[2], K=k.shape[2])
    return Planned(choose(backend), mask, scale, softcap, plan.block, decay)


def choose(backend: Backend) -> str:
    """The form that runs: the named one; for `auto` the Pallas kernel on a TPU or GPU, else the tiled XLA form.

    Raises ValueError for a name that is none, or whose platform is not the one that is compiled for.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"attend: backend = {backend!r}: expected one of {', '.join(get_args(Backend))}")
    target = platform()
    if backend in KERNELS and target != backend:
        raise ValueError(f"attend: backend = {backend!r}: expected 'auto', 'xla' or 'reference' on {target}")
    chosen = (target if target in KERNELS else "xla") if backend == "auto" else backend
    _log_once(backend, chosen, target)
    return chosen


@functools.cache
def _log_once(asked: str, chosen: str, platform: str) -> None:
    logging.getLogger("lcx").info("attention backend %s -> %s on %s", asked, chosen, platform)
