"""All-gather: every device holds all keys while a layer attends. Simple, little latency, memory grows with the whole length.

For grouped heads with few key heads often the fastest (Llama 3, 2024, section 3.3.2). The gathered keys are not kept for the
backward pass; gradients of keys are summed where they belong by a reduce-scatter.
"""

import dataclasses

import jax

from lcx.attention.communication import Communication, Wrapped
from lcx.parallel.gathered import gather, scatter


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGather(Communication):
    """Keys and values are gathered, queries stay."""

    def wrap(self, fold, axes):
        return Gathered(fold, axes)

    @property
    def whole_rows(self):
        return True

    def refusal(self, axes, heads, kv_heads):
        return None

    @classmethod
    def examples(cls):
        return (cls(),)


class Gathered(Wrapped):
    def forward(self, q, k, v, q_tokens, k_tokens):
        return self.inner.forward(q, *self._gather(k, v), q_tokens, *self._gather(k_tokens))

    def backward(self, q, k, v, q_tokens, k_tokens, lse, delta, d_out):
        k, v, k_tokens = self._gather(k, v, k_tokens)
        dq, dk, dv = self.inner.backward(q, k, v, q_tokens, k_tokens, lse, delta, d_out)
        return dq, *(scatter(leaf, ((), self.own, (), ())) for leaf in (dk, dv))

    def _gather(self, *trees):
        return jax.tree.map(lambda leaf: gather(leaf, ((), self.own)), trees)
