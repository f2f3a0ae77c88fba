"""Language modelling: sum over t of w_t * (logsumexp(z_t) - z_t[target_t]), the head applied in chunks of tokens.

Hidden states [B,T,M] become [n, rows, shards, B/rows, chunk, M]; logits exist for one chunk at a time and are recomputed in
the backward pass. `rows` and `shards` count the devices along batch and sequence, so a chunk is made of tokens that each
device already holds.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lcx.batch import Batch
from lcx.objectives.objective import Objective, Sums
from lcx.parallel.rules import Rules, ambient_mesh, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling(Objective):
    """chunk: tokens of each row (of each device's share of it) whose logits exist at a time.

    z_loss: weight of logsumexp(z)^2 (PaLM, 2022); 0 leaves it out.
    """

    chunk: int = 1024
    z_loss: float = 0.0

    def validate(self):
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        self.check(self.z_loss >= 0, "z_loss", "0 or a positive weight")

    def loss(self, model: nnx.Module, batch: Batch, key: Any) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        """Sums over the batch. `loss_sum` is the cross-entropy alone; `correct` weighs tokens whose target has the top logit.

        Auxiliary losses of the model are per token: they enter the total times the weight, once. A weighted target outside
        the vocabulary makes the total NaN, which stops training. Raises ValueError if the batch has no targets or weights.
        """
        if batch.targets is None or batch.loss_weights is None:
            raise ValueError("language modelling: the batch needs targets and loss_weights; prompts have none")
        hidden, _, aux = model(batch)
        sums = self._chunked(model, hidden, batch)
        weight = sums["weight"]
        total = sums["loss_sum"] + self.z_loss * sums.get("z_sum", 0.0)
        total = total + weight * sum(value for name, value in aux.items() if name.endswith("_loss"))
        return total, weight, sums | {name: value * weight for name, value in aux.items()}

    def _chunked(self, model: nnx.Module, hidden: Float[Array, "B T M"], batch: Batch) -> Sums:
        rules = model.spec.rules
        rows, shards = _grid(rules)
        cut = lambda leaf: _cut(leaf, self.chunk, rows, shards, rules)
        chunks = cut(hidden), cut(batch.targets), cut(batch.loss_weights.astype(jnp.float32))
        logits = _local_logits(model, rows, shards, rules)

        @jax.checkpoint
        def body(sums, chunk):
            return jax.tree.map(jnp.add, sums, self._sums(logits(chunk[0]), *chunk[1:])), None

        names = ("loss_sum", "weight", "correct") + (("z_sum",) if self.z_loss else ())
        return jax.lax.scan(body, {name: jnp.zeros((), jnp.float32) for name in names}, chunks)[0]

    def _sums(self, logits: Float[Array, "*n V"], targets: Int[Array, "*n"], weights: Float[Array, "*n"]) -> Sums:
        # A comparison, not a gather: it stays local when the vocabulary is sharded.
        chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
        lse = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.where(chosen, logits, 0).sum(axis=-1)
        known = (targets >= 0) & (targets < logits.shape[-1])
        loss = jnp.where(known, lse - target, jnp.nan)
        weigh = lambda value: jnp.where(weights != 0, weights * value, 0).sum()
        sums = {"loss_sum": weigh(loss), "weight": weights.sum(), "correct": weigh(logits.argmax(axis=-1) == targets)}
        return sums | ({"z_sum": weigh(lse**2)} if self.z_loss else {})

    def report(self, sums):
        figures = super().report(sums)
        return {"accuracy" if name == "correct" else name: value for name, value in figures.items()}

    @classmethod
    def examples(cls):
        return (cls(), cls(chunk=3, z_loss=1e-3))


def _grid(rules: Rules) -> tuple[int, int]:
    """Over how many devices the ambient mesh spreads the rows, and over how many the sequence."""
    mesh = ambient_mesh()
    size = lambda axes: 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    return size(rules.batch), size(rules.sequence)


def _cut(leaf: Array, chunk: int, rows: int, shards: int, rules: Rules) -> Array:
    """[B, T, ...] -> [n, rows, shards, B/rows, chunk, ...], each shard padded with zeros (weight 0) to whole chunks."""
    B, T, *rest = leaf.shape
    if B % rows or T % shards:
        raise ValueError(f"language modelling: {B} rows of {T} tokens do not divide over {rows} x {shards} devices")
    local = T // shards
    chunk = min(chunk, local)
    n = -(-local // chunk)
    leaf = leaf.reshape(rows, B // rows, shards, local, *rest)
    leaf = jnp.pad(leaf, ((0, 0),) * 3 + ((0, n * chunk - local),) + ((0, 0),) * len(rest))
    leaf = leaf.reshape(rows, B // rows, shards, n, chunk, *rest)
    leaf = jnp.moveaxis(leaf, (3, 0, 2), (0, 1, 2))
    return shard(leaf, rules, None, "batch", "sequence", *(None,) * (2 + len(rest)))


def _local_logits(model: nnx.Module, rows: int, shards: int, rules: Rules) -> Callable[[Array], Array]:
    """Logits of a chunk [rows, shards, B, T, M] by a copy of the head for each device, so that the gradient of the head is
    summed over the devices once after the last chunk, and not after each.
    """
    if rows * shards == 1:
        return model.logits
    free = PartitionSpec.UNCONSTRAINED
    lead = rules.partition(("batch", "sequence"))

    def copy(leaf):
        spread = jnp.broadcast_to(leaf, (rows, shards, *leaf.shape))
        return jax.lax.with_sharding_constraint(spread, PartitionSpec(*lead, *(free,) * leaf.ndim))

    copies = jax.tree.map(copy, model)
    each = jax.vmap(jax.vmap(lambda model, hidden: model.logits(hidden)))
    return lambda hidden: shard(each(copies, hidden), rules, "batch", "sequence", None, None, "vocab")
