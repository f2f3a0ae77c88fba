"""Ulysses: devices exchange the sequence for heads, attend to whole rows, and exchange back (DeepSpeed-Ulysses, 2023).

[B, T/W, H, D] -> all-to-all -> [B, T, H/W, D]; four all-to-alls a layer forward (q, k, v, out). Fewer key heads than devices
are repeated, as many times as it takes, before they are exchanged; their gradients are summed. The exchange does not overlap
with anything, but its bytes fall with the number of devices, where a ring's do not.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lcx.attention.communication import Communication, Wrapped
from lcx.attention.ring import nested_rings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ulysses(Communication):
    """All-to-all over every axis of the sequence."""

    def wrap(self, fold, axes):
        return Exchanged(fold, axes)

    @property
    def whole_rows(self):
        return True

    def refusal(self, axes, heads, kv_heads):
        return _refusal(math.prod(axes.values()), heads, kv_heads)

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingUlysses(Communication):
    """All-to-all over the last axis of the sequence (fast links), rings over the ones before it (USP, 2024)."""

    def wrap(self, fold, axes):
        return Exchanged(nested_rings(fold, axes[:-1]), axes[-1])

    def refusal(self, axes, heads, kv_heads):
        if len(axes) < 2:
            return (
                "it needs two axes of the sequence with more than one device each (model.rules.sequence, apart from .batch): "
                "rings over the first, all-to-all the last"
            )
        return _refusal(list(axes.values())[-1], heads, kv_heads)

    @classmethod
    def examples(cls):
        return (cls(),)


class Exchanged(Wrapped):
    def forward(self, q, k, v, q_tokens, k_tokens):
        k, v = self._repeat(q, k), self._repeat(q, v)
        q, k, v = map(self._to_heads, (q, k, v))
        out, lse = self._shared.forward(q, k, v, *self._gather(q_tokens, k_tokens))
        return self._to_tokens(out), self._to_tokens(lse)

    def backward(self, q, k, v, q_tokens, k_tokens, lse, delta, d_out):
        kv_heads = k.shape[2]
        k, v = self._repeat(q, k), self._repeat(q, v)
        q, k, v, lse, delta, d_out = map(self._to_heads, (q, k, v, lse, delta, d_out))
        gradients = self._shared.backward(q, k, v, *self._gather(q_tokens, k_tokens), lse, delta, d_out)
        dq, dk, dv = map(self._to_tokens, gradients)
        total = lambda x: x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).sum(axis=3)
        return dq, total(dk), total(dv)

    @property
    def _shared(self):
        return self.inner.shared_heads(self.axis)

    def _repeat(self, q, x):
        """Key heads repeated so that every device gets whole ones."""
        times = _repeats(jax.lax.axis_size(self.axis), x.shape[2])
        return jnp.repeat(x, times, axis=2)

    def _to_heads(self, x):
        return jax.lax.all_to_all(x, self.axis, split_axis=2, concat_axis=1, tiled=True)

    def _to_tokens(self, x):
        return jax.lax.all_to_all(x, self.axis, split_axis=1, concat_axis=2, tiled=True)

    def _gather(self, *trees):
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.axis, axis=1, tiled=True), trees)


def _repeats(devices: int, kv_heads: int) -> int:
    """The fewest copies of each key head that the devices can share out."""
    return devices // math.gcd(devices, kv_heads)


def _refusal(devices: int, heads: int, kv_heads: int) -> str | None:
    if heads % devices:
        return f"it shares out {heads} query heads over {devices} devices: expected a multiple"
    if (heads // kv_heads) % _repeats(devices, kv_heads):
        return f"{kv_heads} key heads of {heads // kv_heads} query heads each cannot be shared out over {devices} devices"
    return None
