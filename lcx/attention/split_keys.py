"""Split keys: every device has all queries and a share of the keys, as of a cache; parts of one softmax are summed up.

    m = max over devices of lse,   w = exp(lse - m),   out = sum w out / sum w,   lse = m + log sum w

FlashDecoding (2023) on a mesh: what is sent is one row of results a query and head, whatever the length.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lcx.attention.attend import local_fold
from lcx.attention.mask import tokens_of
from lcx.attention.sharded import own_heads
from lcx.batch import TokenInfo
from lcx.parallel.rules import Rules, ambient_mesh
from pallas_kernels.tile_attention import op


def split_attend(
    q: Float[Array, "B T H _"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_info: TokenInfo,
    k_info: TokenInfo,
    *,
    rules: Rules,
    **options,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """`attend` with the same options, keys over the mesh axes of `rules.slots`. Raises ValueError for a distance plan that
    reads queries, which chooses among all keys, of which a device has a share, or that chooses channels (not tried)."""
    axes, distances = split_axes(rules), options.get("distances")
    if distances is not None and (distances.plan.reads_queries or distances.plan.chooses):
        raise ValueError(f"attend: {distances.plan} with keys shared out over {', '.join(axes)}: expected whole rows of keys")
    heads, kv_heads = q.shape[2], k.shape[2]

    def local(q, k, v, q_tokens, k_tokens):
        own = functools.partial(own_heads, group=heads // kv_heads, queries=q.shape[2], kv_heads=kv_heads, rules=rules)
        k, v = own(k, axis=2), own(v, axis=2)
        fold = local_fold(q, k, heads=heads, head_axes=rules.heads, **options)
        return summed_up(*op.attention(fold, q, k, v, q_tokens, k_tokens), axes)

    queries, keys = rules.partition(("batch", None, "heads", None)), rules.partition(("batch", "slots", "kv_heads", None))
    infos = [
        jax.tree.map(lambda _, axis=axis: PartitionSpec(*rules.partition(("batch", axis))), tokens_of(info))
        for axis, info in ((None, q_info), ("slots", k_info))
    ]
    specs = (queries, keys, keys, *infos)
    run = jax.shard_map(local, in_specs=specs, out_specs=(queries, rules.partition(("batch", None, "heads"))), check_vma=False)
    return run(q, k, v, tokens_of(q_info), tokens_of(k_info))


def summed_up(
    out: Float[Array, "B T H E"], lse: Float[Array, "B T H"], axes: tuple[str, ...]
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Parts of one softmax, each of a device along `axes`, as a whole on all of them."""
    top = jax.lax.pmax(lse, axes)
    share = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0, top))
    total = jax.lax.psum(share, axes)
    out = jax.lax.psum(out * share[..., None], axes) / jnp.where(total == 0, 1, total)[..., None]
    return out, jnp.where(total == 0, -jnp.inf, top + jnp.log(total))


def split_axes(rules: Rules) -> tuple[str, ...]:
    """The axes of the ambient mesh over which slots are shared out."""
    mesh = ambient_mesh()
    return () if mesh is None else tuple(axis for axis in rules.slots if mesh.shape[axis] > 1)
