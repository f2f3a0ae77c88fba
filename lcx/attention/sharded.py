"""attend on a mesh: batch and heads stay where they are, keys and values are gathered over the context axis."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lcx.attention.attend import attend
from lcx.batch import TokenInfo
from lcx.parallel.rules import Rules, ambient_mesh


def sharded_attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_info: TokenInfo,
    k_info: TokenInfo,
    *,
    rules: Rules,
    **options,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """`attend` with the same arguments and result under the ambient mesh; each device computes its own queries and heads.

    Key heads lie on the mesh as the query heads do, or every device has them all and takes those of its queries.
    """
    if ambient_mesh() is None:
        return attend(q, k, v, q_info, k_info, **options)

    def local(q, k, v, q_info, k_info):
        for axis in rules.sequence:
            gather = lambda leaf, axis=axis: jax.lax.all_gather(leaf, axis, axis=1, tiled=True)
            k, v, k_info = jax.tree.map(gather, (k, v, k_info))
        k, v = (_own(leaf, heads // kv_heads, q.shape[2], kv_heads, rules) for leaf in (k, v))
        return attend(q, k, v, q_info, k_info, **options)

    heads, kv_heads = q.shape[2], k.shape[2]
    queries, keys = (rules.partition(("batch", "sequence", heads, None)) for heads in ("heads", "kv_heads"))
    tokens = rules.partition(("batch", "sequence"))
    infos = jax.tree.map(lambda leaf: PartitionSpec(*tokens, *(None,) * (leaf.ndim - 2)), (q_info, k_info))
    lse = rules.partition(("batch", "sequence", "heads"))
    run = jax.shard_map(local, in_specs=(queries, keys, keys, *infos), out_specs=(queries, lse), check_vma=False)
    return run(q, k, v, q_info, k_info)


def _own(x: Float[Array, "B S k D"], group: int, queries: int, kv_heads: int, rules: Rules) -> Float[Array, "B S own D"]:
    """Of keys or values, the heads that this device's `queries` query heads read; `group` query heads share a key head."""
    if x.shape[2] < kv_heads or queries == group * kv_heads:
        return x
    first = jax.lax.axis_index(rules.heads) * queries // group
    return jax.lax.dynamic_slice_in_dim(x, first, max(1, queries // group), axis=2)
