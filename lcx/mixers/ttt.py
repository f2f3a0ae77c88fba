"""TTT-Linear and TTT-MLP (Sun et al. 2024): the state is a network that learns to map keys to values while it reads.

In mini-batches of `chunk` tokens from a document's start, every token i reads what gradients of the tokens j <= i, taken at the
mini-batch's start, have made of the weights, with the rates

    eta_ij = rate / D * max(0, 1 / (i + 1) + c_i) * sigmoid(x_j g + b)

The network is k + LN(k W + b), or two layers with GELU between and LN behind; weights at a document's start are learned, as are
LN's, which no token changes. q and k turn by their place in the mini-batch. A LayerNorm and the output matrix join the heads.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcx.batch import Batch
from lcx.linear import linear
from lcx.memory.chunked import first_state, real_tokens, run
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place, residual_gain, weight
from lcx.mixers.short_convolution import convolved_heads, empty_convolution
from lcx.norms import LayerNorm
from lcx.parallel.rules import row_axes, shard, whole_rows
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.record import record
from pallas_kernels.fast_weight.coefficients import mini_batch
from pallas_kernels.fast_weight.network import Fixed, Network, Weights
from pallas_kernels.fast_weight.op import FastWeight, State

NETWORK = Network(activation="gelu_tanh", output="norm", eps=1e-6)
START = 0.02  # standard deviation of the weights at a document's start


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTT(Mixer):
    """head_dim: of q, k and v. depth: matrices of the network: 1 is TTT-Linear, 2 TTT-MLP, whose hidden layer is `expand` times
    as wide. chunk: tokens whose gradients are taken together. rate: of a step, 1 for depth 1 and 0.1 for depth 2 in the paper.
    rope_base: None is without rotation. shared: q and k are convolutions of `taps` tokens of one projection. gate: the output
    is multiplied by GELU(W x)."""

    heads: int
    head_dim: int
    depth: int = 1
    expand: int = 4
    chunk: int = 16
    rate: float = 1.0
    rope_base: float | None = 10_000.0
    shared: bool = False
    gate: bool = False
    taps: int = 4
    sequential = True
    recurrent = True
    chunked = True

    def validate(self):
        for field in ("heads", "head_dim", "depth", "expand", "chunk", "taps"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(self.rate > 0, "rate", "a positive number")
        self.check(self.rope_base is None or self.head_dim % 2 == 0, "head_dim", "an even number, or rope_base None")

    def build(self, inherited, *, rngs):
        return TTTModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        return (
            cls(heads=2, head_dim=4, chunk=4),
            cls(heads=2, head_dim=4, depth=2, expand=2, chunk=4, rate=0.1, shared=True, gate=True),
        )


@record
class TTTState:
    """memory: of the fast weights. query, key: of the convolutions, None without."""

    memory: Any
    query: Any
    key: Any


class TTTModule(MixerModule):
    def __init__(self, spec: TTT, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        M, H, D = inherited.width, spec.heads, spec.head_dim
        project = lambda: weight(rngs, (M, H, D), ("width", "heads", None), fan_in=M)
        zeros = lambda shape, axes: nnx.Param(jnp.zeros(shape), axes=axes)
        self.query = project()
        self.value = project()
        if spec.shared:
            kernel = lambda: weight(rngs, (spec.taps, H, D), (None, "heads", None), fan_in=spec.taps)
            self.query_kernel, self.key_kernel = kernel(), kernel()
            self.query_bias, self.key_bias = zeros((H, D), ("heads", None)), zeros((H, D), ("heads", None))
        else:
            self.key = project()
        self.rate = weight(rngs, (M, H), ("width", "heads"), fan_in=M)
        self.rate_bias = zeros((H,), ("heads",))
        self.place_rate = zeros((spec.chunk,), (None,))
        sizes = [D, *[spec.expand * D] * (spec.depth - 1), D]
        start = lambda i, o: nnx.Param(START * jax.random.normal(rngs.params(), (H, i, o)), axes=("heads", None, None))
        self.start = nnx.List([start(i, o) for i, o in itertools.pairwise(sizes)])
        self.start_bias = nnx.List([zeros((H, o), ("heads", None)) for o in sizes[1:]])
        self.norm_weight = nnx.Param(jnp.ones((H, D)), axes=("heads", None))
        self.norm_bias = zeros((H, D), ("heads", None))
        self.norm = LayerNorm(eps=1e-6).build(H * D)
        self.gate = project() if spec.gate else None
        self.output = weight(rngs, (H, D, M), ("heads", None, "width"), fan_in=H * D, gain=residual_gain(inherited))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        spec, rules, info = self.spec, self.inherited.rules, batch.info
        project = functools.partial(linear, x, rules=rules, gradient_sum=self.inherited.gradient_sum)
        whole = functools.partial(whole_rows, rules=rules, heads=spec.heads)
        q, at_query, at_key = project(self.query), None, None
        if spec.shared:
            held = (None, None) if state is None else (state.query, state.key)
            k, at_key = self._local(q, self.key_kernel, self.key_bias, info, held[1])
            q, at_query = self._local(q, self.query_kernel, self.query_bias, info, held[0])
        else:
            k = project(self.key)
        q, k, v = map(whole, (q, k, project(self.value)))
        slot = info.index % spec.chunk
        if spec.rope_base is not None:
            frequencies = Rope(base=spec.rope_base, pairing="interleaved").frequencies(spec.head_dim, spec.chunk)
            places = slot[..., None].astype(jnp.float32)
            q, k = rotate(q, places, frequencies), rotate(k, places, frequencies, side="key")
        row = jnp.maximum(0.0, 1.0 / (slot + 1) + self.place_rate[...][slot])
        row = jnp.broadcast_to(row[..., None], q.shape[:3])
        column = spec.rate / spec.head_dim * jax.nn.sigmoid(whole(project(self.rate)) + self.rate_bias[...])
        memory = None if state is None else state.memory
        gates = (row, column, real_tokens(info, spec.heads))
        options = {"chunk": spec.chunk, "documents": self.inherited.documents, "axes": row_axes(rules, spec.heads)}
        out, memory, _ = run(self._kind(), self._first(), q, k, v, gates, info, memory, **options)
        out = self.norm(out.reshape(*x.shape[:2], -1)).reshape(out.shape)
        if self.gate is not None:
            out = out * jax.nn.gelu(whole(project(self.gate)))
        y = linear(out.astype(x.dtype), self.output, rules, contracted=2, gradient_sum=self.inherited.gradient_sum)
        state = None if state is None else TTTState(memory=memory, query=at_query, key=at_key)
        return shard(y, rules, "batch", "sequence", None), state, {}

    def _kind(self) -> FastWeight:
        return FastWeight(NETWORK, _coefficients, Fixed(self.norm_weight[...], self.norm_bias[...]))

    def _first(self) -> State:
        weights = Weights(tuple(w[...] for w in self.start), tuple(b[...] for b in self.start_bias))
        return State(weights, None)

    def _local(self, y, kernel, bias, info, state):
        """The convolution of a projection [B,T,H,D], and its state."""
        found, state = convolved_heads(y, info, state, kernel[...])
        return found + bias[...].astype(y.dtype), state

    def init_state(self, batch_size, length):
        spec, compute = self.spec, self.inherited.compute
        local = lambda: empty_convolution(batch_size, spec.taps - 1, spec.heads * spec.head_dim, compute)
        gates = (jnp.zeros((1, 1, spec.heads)),) * 3
        memory = first_state(self._kind(), self._first(), gates, batch_size, spec.chunk)
        query, key = (local(), local()) if spec.shared else (None, None)
        return TTTState(memory=memory, query=query, key=key)


def _coefficients(row, column, real):
    return mini_batch(row, column, real > 0)
