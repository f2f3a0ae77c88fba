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
    """`attend` with the same arguments and result under the ambient mesh; each device computes its own queries and heads."""
    if ambient_mesh() is None:
        return attend(q, k, v, q_info, k_info, **options)

    def local(q, k, v, q_info, k_info):
        for axis in rules.sequence:
            gather = lambda leaf, axis=axis: jax.lax.all_gather(leaf, axis, axis=1, tiled=True)
            k, v, k_info = jax.tree.map(gather, (k, v, k_info))
        return attend(q, k, v, q_info, k_info, **options)

    queries, keys = (rules.partition(("batch", "sequence", heads, None)) for heads in ("heads", "kv_heads"))
    tokens = rules.partition(("batch", "sequence"))
    infos = jax.tree.map(lambda leaf: PartitionSpec(*tokens, *(None,) * (leaf.ndim - 2)), (q_info, k_info))
    lse = rules.partition(("batch", "sequence", "heads"))
    run = jax.shard_map(local, in_specs=(queries, keys, keys, *infos), out_specs=(queries, lse), check_vma=False)
    return run(q, k, v, q_info, k_info)
