"""Gated DeltaNet and what it grew from: a matrix a head as memory, written at every token and read in constant time.

    h_t = exp(g_t) h_{t-1} + beta_t k_t (v_t - exp(g_t) h_{t-1}^T k_t)^T,   o_t = h_t^T q_t / sqrt(D)

    rule `delta`, decay `learned`   gated DeltaNet (Yang et al. 2024)
    rule `delta`, decay `none`      DeltaNet (Schlag et al. 2021, Yang et al. 2024): g = 0
    rule `sum`, decay `learned`     gated linear attention with one gate a head: h_t = exp(g_t) h_{t-1} + beta_t k_t v_t^T
    rule `sum`, decay `none`        linear attention (Katharopoulos et al. 2020), without its normaliser

q, k and v are SiLU of a causal convolution of `taps` tokens behind their projections, q and k scaled to length 1; beta =
sigmoid(W x), doubled where `beta` is 2 (negative eigenvalues, Grazzi et al. 2024); g = -exp(A) softplus(W x + b). A head's
output passes an RMSNorm and is multiplied by SiLU(W x). The state is float32, whatever the model computes in.

It reads array neighbours, as the convolution does: padding stands outside of documents unless a state is given. On a mesh a
device has whole rows of its share of the heads, over the axes of the sequence too where heads divide; else these repeat work.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.batch import PADDING, Batch
from lcx.linear import linear
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place, residual_gain, weight
from lcx.mixers.neighbours import resumed, torn
from lcx.mixers.short_convolution import ConvolutionState, convolved_heads, empty_convolution
from lcx.norms import RMSNorm
from lcx.parallel.rules import row_axes, shard, whole_rows
from lcx.record import record
from pallas_kernels.fast_weight.coefficients import LEAST, Coefficients, Gradient, decayed
from pallas_kernels.fast_weight.network import Network, Weights
from pallas_kernels.fast_weight.op import FastWeight, State, fast_weight

NETWORKS = {"delta": Network(), "sum": Network(target="hebbian")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(Mixer):
    """head_dim: of q and k; value_dim: of v, None is twice that. chunk: tokens that are computed at once; the numbers are the
    same for any, to rounding. taps: of the convolutions; 0 is none."""

    heads: int
    head_dim: int
    value_dim: int | None = None
    rule: Literal["delta", "sum"] = "delta"
    decay: Literal["learned", "none"] = "learned"
    beta: float = 1.0
    taps: int = 4
    chunk: int = 64
    norm_eps: float = 1e-5
    sequential = True
    recurrent = True

    def validate(self):
        for field in ("heads", "head_dim", "chunk"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(self.value_dim is None or self.value_dim >= 1, "value_dim", "at least 1, or None")
        self.check(0 < self.beta <= 2, "beta", "above 0 and at most 2, beyond which the delta rule diverges")
        self.check(self.taps >= 0, "taps", "0 or a positive number")

    @property
    def values(self) -> int:
        return 2 * self.head_dim if self.value_dim is None else self.value_dim

    def build(self, inherited, *, rngs):
        return GatedDeltaNetModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        return (
            cls(heads=2, head_dim=4, chunk=4),
            cls(heads=2, head_dim=4, value_dim=3, decay="none", beta=2.0, taps=0, chunk=5),
            cls(heads=1, head_dim=4, rule="sum", taps=2),
        )


@record
class DeltaState:
    """memory: of every head, float32. index, segments: of the newest token; segment 0 before any. The convolutions' last
    tokens, None where there are none."""

    memory: Float[Array, "B H D E"]
    index: Int[Array, "B"]
    segments: Int[Array, "B"]
    query: ConvolutionState | None
    key: ConvolutionState | None
    value: ConvolutionState | None


class GatedDeltaNetModule(MixerModule):
    def __init__(self, spec: GatedDeltaNet, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        M, H, D, E = inherited.width, spec.heads, spec.head_dim, spec.values
        projection = lambda size: weight(rngs, (M, H, size), ("width", "heads", None), fan_in=M)
        self.query, self.key, self.value, self.gate = projection(D), projection(D), projection(E), projection(E)
        self.beta = weight(rngs, (M, H), ("width", "heads"), fan_in=M)
        self.output = weight(rngs, (H, E, M), ("heads", None, "width"), fan_in=H * E, gain=residual_gain(inherited))
        self.norm = RMSNorm(eps=spec.norm_eps).build(E)
        if spec.taps:
            kernel = lambda size: weight(rngs, (spec.taps, H, size), (None, "heads", None), fan_in=spec.taps)
            self.query_kernel, self.key_kernel, self.value_kernel = kernel(D), kernel(D), kernel(E)
        if spec.decay == "learned":
            self.decay = weight(rngs, (M, H), ("width", "heads"), fan_in=M)
            rate = jax.random.uniform(rngs.params(), (H,), minval=1e-3, maxval=16.0)
            self.rate_bias = nnx.Param(jnp.log(rate), axes=("heads",))
            low, high = math.log(1e-3), math.log(1e-1)
            first = jnp.exp(jax.random.uniform(rngs.params(), (H,), minval=low, maxval=high))
            self.decay_bias = nnx.Param(first + jnp.log(-jnp.expm1(-first)), axes=("heads",))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        spec, rules, info = self.spec, self.inherited.rules, batch.info
        project = functools.partial(linear, x, rules=rules, gradient_sum=self.inherited.gradient_sum)
        q, at_query = self._local(project(self.query), "query", info, state)
        k, at_key = self._local(project(self.key), "key", info, state)
        v, at_value = self._local(project(self.value), "value", info, state)
        unit = lambda y: y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)
        whole = functools.partial(whole_rows, rules=rules, heads=spec.heads)
        q, k, v = map(whole, (q, k, v))
        beta = spec.beta * jax.nn.sigmoid(whole(project(self.beta)))
        log_decay = jnp.zeros_like(beta)
        if spec.decay == "learned":
            rate = jnp.exp(self.rate_bias[...])
            log_decay = -rate * jax.nn.softplus(whole(project(self.decay)) + self.decay_bias[...])
        log_decay = jnp.where((info.index == 0)[..., None], LEAST, log_decay)  # a document begins with an empty memory
        real = jnp.broadcast_to((info.segments != PADDING)[..., None], beta.shape)
        empty = jnp.zeros((x.shape[0], spec.heads, spec.head_dim, spec.values), jnp.float32)
        before = Weights((empty if state is None else state.memory,))
        gradient = "decayed" if spec.rule == "delta" else "start"
        kind = FastWeight(NETWORKS[spec.rule], functools.partial(_coefficients, gradient=gradient))
        gates = (beta, log_decay, real.astype(jnp.float32))
        q, k = unit(q) * spec.head_dim**-0.5, unit(k)
        out, after, _ = fast_weight(kind, State(before), q, k, v, gates, chunk=spec.chunk, axes=row_axes(rules, spec.heads))
        out = self.norm(out) * jax.nn.silu(whole(project(self.gate)))
        if state is None:
            broken = torn(info)
        else:
            broken, index, segments = resumed(info, state.index, state.segments)
            newest = {"index": index, "segments": segments}
            state = DeltaState(memory=after.weights.matrices[0], **newest, query=at_query, key=at_key, value=at_value)
        out = jnp.where(broken[..., None, None], jnp.nan, out)
        y = linear(out.astype(x.dtype), self.output, rules, contracted=2, gradient_sum=self.inherited.gradient_sum)
        return shard(y, rules, "batch", "sequence", None), state, {}

    def _local(self, y, name: str, info, state: DeltaState | None):
        """SiLU of the convolution of a projection [B,T,H,size], and the convolution's state."""
        if not self.spec.taps:
            return jax.nn.silu(y), None
        kernel = getattr(self, f"{name}_kernel")[...]
        found, held = convolved_heads(y, info, None if state is None else getattr(state, name), kernel)
        return jax.nn.silu(found), held

    def init_state(self, batch_size, length):
        spec, compute = self.spec, self.inherited.compute
        empty = lambda size: empty_convolution(batch_size, spec.taps - 1, spec.heads * size, compute) if spec.taps else None
        memory = jnp.zeros((batch_size, spec.heads, spec.head_dim, spec.values), jnp.float32)
        none = jnp.zeros(batch_size, jnp.int32)
        local = {"query": empty(spec.head_dim), "key": empty(spec.head_dim), "value": empty(spec.values)}
        return DeltaState(memory=memory, index=none, segments=none, **local)


def _coefficients(beta, log_decay, real, *, gradient: Gradient) -> Coefficients:
    return decayed(beta, log_decay, real=real > 0, gradient=gradient)
