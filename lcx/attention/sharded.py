"""attend on a mesh: batch and heads stay where they are, keys meet queries over the axes that shard the sequence."""

import functools

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lcx.attention.attend import Backend, attend, check_call, choose, local_fold, nothing_seen
from lcx.attention.communication import Communication
from lcx.attention.mask import Mask, tokens_of
from lcx.attention.plan import BlockPlan, check_plan
from lcx.batch import TokenInfo
from lcx.parallel.gathered import axes_size
from lcx.parallel.rules import Rules, ambient_mesh
from lcx.positions.distance_plan import Distances
from lcx.positions.linear_bias import LinearBias
from pallas_kernels.tile_attention import op


def sharded_attend(
    q: Float[Array, "B T H _"],
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
    bias: LinearBias | None = None,
    plan: BlockPlan | None = None,
    distances: Distances | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """`attend` with the same arguments and result under the ambient mesh; each device computes its own queries and heads.

    Key heads lie on the mesh as the query heads do, or every device has them all and takes those of its queries; a plan's
    groups lie as the heads that they are of. Raises ValueError for a plan where the sequence is sharded: its tiles are places
    in whole rows, and which of them meet on a device is up to the communication.
    """
    options = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias, "distances": distances, "backend": backend}
    mesh = ambient_mesh()
    if mesh is None:
        return attend(q, k, v, q_info, k_info, plan=plan, **options)
    check_call(q, k, v, q_info, k_info, mask=mask, scale=scale, softcap=softcap, bias=bias, distances=distances)
    _check_rules(rules, mesh)
    axes = tuple(axis for axis in rules.sequence if mesh.shape[axis] > 1)
    if axes and plan is not None:
        raise ValueError(
            f"attend: a block plan, of whole rows, with rows shared out over {', '.join(axes)}: expected whole rows"
        )
    _check_shares(q, k, rules, communication, {axis: mesh.shape[axis] for axis in axes})
    if axes and distances is not None and distances.plan.reads_queries and not communication.whole_rows:
        raise ValueError(f"attend: {distances.plan} with {communication}: expected AllGather() or Ulysses(), of whole rows")
    if distances is not None and distances.plan.reads_queries and q.shape[2] != k.shape[2]:
        raise ValueError(f"attend: {k.shape[2]} key heads with {distances.plan} on a mesh: expected one of each query head")

    def local(q, k, v, q_tokens, k_tokens, plan):
        own = functools.partial(own_heads, group=heads // kv_heads, queries=q.shape[2], kv_heads=kv_heads, rules=rules)
        k, v = own(k, axis=2), own(v, axis=2)
        if groups == "kv_heads":
            plan = jax.tree.map(functools.partial(own, axis=1), plan)
        fold = local_fold(q, k, plan=plan, heads=heads, head_axes=rules.heads, **options)
        plans = () if plan is None else (plan,)
        return op.attention(communication.wrap(fold, axes) if axes else fold, q, k, v, q_tokens, k_tokens, *plans)

    heads, kv_heads = q.shape[2], k.shape[2]
    if plan is not None:
        check_plan(plan, B=q.shape[0], T=q.shape[1], S=k.shape[1], H=heads, K=kv_heads)
    choose(backend)
    if 0 in (q.size, k.size):
        return nothing_seen(q, v)
    groups = None if plan is None else {heads: "heads", kv_heads: "kv_heads", 1: None}.get(plan.rows.shape[1])
    queries, keys = (rules.partition(("batch", "sequence", heads, None)) for heads in ("heads", "kv_heads"))
    tokens = tokens_of(q_info), tokens_of(k_info)
    infos = jax.tree.map(lambda _: PartitionSpec(*rules.partition(("batch", "sequence"))), tokens)
    lse = rules.partition(("batch", "sequence", "heads"))
    lists = rules.partition(("batch", groups))
    run = jax.shard_map(local, in_specs=(queries, keys, keys, *infos, lists), out_specs=(queries, lse), check_vma=False)
    return run(q, k, v, *tokens, plan)


def _check_rules(rules: Rules, mesh) -> None:
    """Raises ValueError for what are no rules, or name axes that the mesh does not have."""
    if not isinstance(rules, Rules):
        raise ValueError(f"attend: rules = {rules!r}: expected Rules, such as Rules()")
    named = {axis for name in ("batch", "sequence", "heads", "kv_heads") for axis in getattr(rules, name)}
    if absent := sorted(named - set(mesh.shape)):
        raise ValueError(f"attend: rules name {', '.join(absent)}: expected axes of the mesh, {', '.join(mesh.shape)}")


def _check_shares(q, k, rules: Rules, communication: Communication, axes: dict[str, int]) -> None:
    """Raises ValueError for arrays that do not divide over the devices, or heads that the communication cannot share out."""
    if not isinstance(communication, Communication):
        raise ValueError(f"attend: communication = {communication!r}: expected a Communication, such as Ring()")
    several = lambda names: tuple(axis for axis in names if axes_size((axis,)) > 1)
    if several(rules.kv_heads) not in ((), several(rules.heads)):
        expected = f"those of heads, {several(rules.heads)}, or none"
        raise ValueError(f"attend: rules share key heads out over {several(rules.kv_heads)}: expected {expected}")
    sides = (("q", q, rules.heads), ("k", k, rules.kv_heads))
    for name, x, heads in sides:
        for what, size, over in (("rows", 0, rules.batch), ("tokens", 1, rules.sequence), ("heads", 2, heads)):
            if x.shape[size] % axes_size(over):
                raise ValueError(
                    f"attend: {x.shape[size]} {what} of {name} over {axes_size(over)} devices: expected a multiple"
                )
    queries = q.shape[2] // axes_size(rules.heads)
    reason = communication.refusal(axes, queries, max(1, queries * k.shape[2] // q.shape[2])) if axes else None
    if reason is not None:
        raise ValueError(f"attend: {type(communication).__name__}(): {reason}")


def own_heads(x: Array, *, axis: int, group: int, queries: int, kv_heads: int, rules: Rules) -> Array:
    """Of key heads on an axis, those that this device's `queries` query heads read; `group` query heads share a key head."""
    if x.shape[axis] < kv_heads or queries == group * kv_heads:
        return x
    if queries % group and group % queries:
        raise ValueError(f"attend: a device's {queries} query heads cannot read whole key heads of {group} query heads each")
    first = jax.lax.axis_index(rules.heads) * queries // group
    return jax.lax.dynamic_slice_in_dim(x, first, max(1, queries // group), axis=axis)


def whole_groups(q: Float[Array, "B T _ D"], *, group: int, rules: Rules) -> Float[Array, "B T _ D"]:
    """Queries of all heads that share this device's key heads, where it has a part of a group of `group` heads."""
    if q.shape[2] % group == 0:
        return q
    first = jax.lax.axis_index(rules.heads) * q.shape[2] // group * group
    every = jax.lax.all_gather(q, rules.heads, axis=2, tiled=True)
    return jax.lax.dynamic_slice_in_dim(every, first, group, axis=2)
