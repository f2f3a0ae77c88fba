"""attend on a mesh: batch and heads stay where they are, keys meet queries over the axes that shard the sequence."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lcx.attention.attend import Backend, attend, local_fold
from lcx.attention.communication import Communication
from lcx.attention.mask import Mask, tokens_of
from lcx.batch import TokenInfo
from lcx.parallel.rules import Rules, ambient_mesh
from pallas_kernels.tile_attention import op


def sharded_attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_info: TokenInfo,
    k_info: TokenInfo,
    *,
    rules: Rules,
    communication: Communication,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """`attend` with the same arguments and result under the ambient mesh; each device computes its own queries and heads.

    Key heads lie on the mesh as the query heads do, or every device has them all and takes those of its queries.
    """
    options = {"mask": mask, "scale": scale, "softcap": softcap, "backend": backend}
    mesh = ambient_mesh()
    if mesh is None:
        return attend(q, k, v, q_info, k_info, **options)
    axes = tuple(axis for axis in rules.sequence if mesh.shape[axis] > 1)

    def local(q, k, v, q_tokens, k_tokens):
        k, v = (_own(leaf, heads // kv_heads, q.shape[2], kv_heads, rules) for leaf in (k, v))
        fold = local_fold(q, k, **options)
        return op.attention(communication.wrap(fold, axes) if axes else fold, q, k, v, q_tokens, k_tokens)

    heads, kv_heads = q.shape[2], k.shape[2]
    queries, keys = (rules.partition(("batch", "sequence", heads, None)) for heads in ("heads", "kv_heads"))
    tokens = tokens_of(q_info), tokens_of(k_info)
    infos = jax.tree.map(lambda _: PartitionSpec(*rules.partition(("batch", "sequence"))), tokens)
    lse = rules.partition(("batch", "sequence", "heads"))
    run = jax.shard_map(local, in_specs=(queries, keys, keys, *infos), out_specs=(queries, lse), check_vma=False)
    return run(q, k, v, *tokens)


def _own(x: Float[Array, "B S k D"], group: int, queries: int, kv_heads: int, rules: Rules) -> Float[Array, "B S own D"]:
    """Of keys or values, the heads that this device's `queries` query heads read; `group` query heads share a key head."""
    if x.shape[2] < kv_heads or queries == group * kv_heads:
        return x
    if queries % group and group % queries:
        raise ValueError(f"attend: a device's {queries} query heads cannot read whole key heads of {group} query heads each")
    first = jax.lax.axis_index(rules.heads) * queries // group
    return jax.lax.dynamic_slice_in_dim(x, first, max(1, queries // group), axis=2)
