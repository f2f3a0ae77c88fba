"""The neural memory of Titans (Behrouz et al. 2024): a small network a head that learns keys and values while it reads.

    S_t = eta_t S_{t-1} - theta_t grad ||f(W_ref; k_t) - v_t||^2 / 2,   W_t = (1 - alpha_t) W_{t-1} + S_t,   o_t = f(W_t; q_t)

with a step theta, momentum eta and forgetting alpha of the token's own, sigmoids of linear maps of x. q, k and v are SiLU of a
causal convolution of `taps` tokens behind their projections, q and k scaled to length 1. As a mixer by itself it is the paper's
LMM: a head's output passes an RMSNorm, is multiplied by SiLU(W x) and goes through the output matrix.

The gradient is taken at the start of the token's chunk, counted from its document's first token, or, for one matrix alone, at
the token (`gradient`). Documents begin with learned weights, which stand for what persistent tokens would have written. All of
the memory is float32. What keeps it finite: keys of length 1; a chunk's steps scaled down to where they should not overshoot
together (`overshoot`); a bound on the norm of its matrices (`norm`); LN in the residual network, k + (1 + g) LN(MLP k) with g
fast as well.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcx.batch import Batch, TokenInfo
from lcx.linear import linear
from lcx.memory.chunked import first_state, real_tokens, run
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place, residual_gain, weight
from lcx.mixers.short_convolution import convolved_heads, empty_convolution
from lcx.norms import RMSNorm
from lcx.parallel.rules import row_axes, shard, whole_rows
from lcx.record import record
from pallas_kernels.fast_weight.coefficients import decayed
from pallas_kernels.fast_weight.network import Network, Weights
from pallas_kernels.fast_weight.op import FastWeight, Gates, State

GATES = ("step", "keep", "momentum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuralMemory(Mixer):
    """head_dim: of q, k and v. depth: matrices of the network, between which it is `expand` times as wide. network: `residual`,
    or `plain` f(k) = MLP(k). chunk: tokens whose gradients are taken together. step: the largest theta. taps: of the
    convolutions; 0 is none. overshoot, norm: see above; None is no bound."""

    heads: int
    head_dim: int
    depth: int = 2
    expand: int = 4
    network: Literal["residual", "plain"] = "residual"
    chunk: int = 64
    gradient: Literal["start", "token"] = "start"
    momentum: bool = True
    decay: bool = True
    step: float = 1.0
    taps: int = 4
    overshoot: float | None = 1.0
    norm: float | None = 100.0
    sequential = True
    recurrent = True
    chunked = True

    def validate(self):
        for field in ("heads", "head_dim", "depth", "expand", "chunk"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(self.taps >= 0, "taps", "0 or a positive number")
        self.check(self.step > 0, "step", "a positive number")
        for field in ("overshoot", "norm"):
            self.check(getattr(self, field) is None or getattr(self, field) > 0, field, "a positive number or None")
        alone = self.gradient == "start" or (self.depth == 1 and self.network == "plain")
        self.check(alone, "gradient", "'start', or depth 1 and network 'plain': only one matrix has exact steps token by token")
        bounded = self.gradient == "start" or self.overshoot is None
        self.check(bounded, "overshoot", "None where gradient is 'token', whose steps overshoot only beyond step = 2")
        self.check(self.gradient == "start" or self.step <= 2, "step", "at most 2 where gradient is 'token'")

    def build(self, inherited, *, rngs):
        return NeuralMemoryModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        small = {"heads": 2, "head_dim": 4, "chunk": 4, "expand": 2}
        return (
            cls(**small),
            cls(**small, depth=3, network="plain", taps=0, momentum=False),
            cls(**small, depth=1, network="plain", gradient="token", overshoot=None),
        )


@record
class NeuralMemoryState:
    """memory: of the fast weights. query, key, value: of the convolutions, None without."""

    memory: Any
    query: Any
    key: Any
    value: Any


class NeuralMemoryModule(MixerModule):
    def __init__(self, spec: NeuralMemory, inherited: Inherited, rngs: nnx.Rngs, *, gated: bool = True):
        """gated: by SiLU(W x), as it is called by itself."""
        self.spec, self.inherited = spec, inherited
        M, H, D = inherited.width, spec.heads, spec.head_dim
        project = lambda: weight(rngs, (M, H, D), ("width", "heads", None), fan_in=M)
        self.query, self.key, self.value = project(), project(), project()
        self.gate = project() if gated else None
        if spec.taps:
            kernel = lambda: weight(rngs, (spec.taps, H, D), (None, "heads", None), fan_in=spec.taps)
            self.query_kernel, self.key_kernel, self.value_kernel = kernel(), kernel(), kernel()
        self.gates, self.gate_bias = nnx.Dict({}), nnx.Dict({})
        for name in self._gate_names:
            self.gates[name] = weight(rngs, (M, H), ("width", "heads"), fan_in=M)
            first = _first_bias(name, rngs, H)
            self.gate_bias[name] = nnx.Param(first, axes=("heads",))
        sizes = [D, *[spec.expand * D] * (spec.depth - 1), D]
        start = lambda i, o, fan_in: weight(rngs, (H, i, o), ("heads", None, None), fan_in=fan_in)
        fan_in = [1, *sizes[1:]]  # keys are of length 1
        self.start = nnx.List([start(i, o, n) for (i, o), n in zip(itertools.pairwise(sizes), fan_in, strict=False)])
        self.start_gain = nnx.Param(jnp.zeros((H, D)), axes=("heads", None)) if spec.network == "residual" else None
        self.norm = RMSNorm().build(D)
        self.output = weight(rngs, (H, D, M), ("heads", None, "width"), fan_in=H * D, gain=residual_gain(inherited))

    @property
    def _gate_names(self) -> tuple[str, ...]:
        return tuple(name for name in GATES if name == "step" or getattr(self.spec, {"keep": "decay"}.get(name, name)))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        spec, info, inherited = self.spec, batch.info, self.inherited
        held = (None,) * 3 if state is None else (state.query, state.key, state.value)
        q, at_query = self._local(x, "query", info, held[0])
        k, at_key = self._local(x, "key", info, held[1])
        v, at_value = self._local(x, "value", info, held[2])
        gates = self.gates_of(x, real_tokens(info, spec.heads))
        memory = None if state is None else state.memory
        options = {"chunk": spec.chunk, "documents": inherited.documents, "axes": row_axes(inherited.rules, spec.heads)}
        out, memory, loss = run(self.kind, self.first, q, k, v, gates, info, memory, **options)
        y = self.joined(self.norm(out) * jax.nn.silu(self._whole(self._project(x, self.gate))), x.dtype)
        if state is not None:
            state = NeuralMemoryState(memory=memory, query=at_query, key=at_key, value=at_value)
        return shard(y, inherited.rules, "batch", "sequence", None), state, {"memory_error": mean_error(loss, gates[-1])}

    @property
    def kind(self) -> FastWeight:
        spec = self.spec
        network = Network(output="gain" if spec.network == "residual" else "plain")
        gradient = "start" if spec.gradient == "start" else "previous"
        build = functools.partial(_coefficients, gradient=gradient)
        return FastWeight(network, build, overshoot=spec.overshoot, norm=spec.norm)

    @property
    def first(self) -> State:
        """Weights at a document's start; no momentum yet."""
        gain = None if self.start_gain is None else self.start_gain[...]
        weights = Weights(tuple(matrix[...] for matrix in self.start), (), gain)
        return State(weights, jax.tree.map(jnp.zeros_like, weights) if self.spec.momentum else None)

    def gates_of(self, x: Float[Array, "B T M"], real: Float[Array, "B T H"]) -> Gates:
        """theta, log(1 - alpha), log eta and which tokens are real: what coefficients are made of."""
        raw = {name: self._whole(self._project(x, self.gates[name])) + self.gate_bias[name][...] for name in self._gate_names}
        step = self.spec.step * jax.nn.sigmoid(raw["step"])
        keep = jax.nn.log_sigmoid(-raw["keep"]) if self.spec.decay else None
        momentum = jax.nn.log_sigmoid(raw["momentum"]) if self.spec.momentum else None
        return step, keep, momentum, real

    @property
    def no_gates(self) -> Gates:
        """Of one token, of the shapes of `gates_of`."""
        spec = self.spec
        gate = jnp.zeros((1, 1, spec.heads))
        return gate, gate if spec.decay else None, gate if spec.momentum else None, gate

    def joined(self, out: Float[Array, "B T H D"], dtype) -> Float[Array, "B T M"]:
        """Heads through the output matrix."""
        inherited = self.inherited
        return linear(out.astype(dtype), self.output, inherited.rules, contracted=2, gradient_sum=inherited.gradient_sum)

    def _project(self, x, matrix):
        return linear(x, matrix, rules=self.inherited.rules, gradient_sum=self.inherited.gradient_sum)

    def _whole(self, y):
        return whole_rows(y, rules=self.inherited.rules, heads=self.spec.heads)

    def _local(self, x, name: str, info: TokenInfo, state: Any) -> tuple[Float[Array, "B T H D"], Any]:
        """q, k or v of whole rows, and the state of its convolution."""
        y = self.raw(x, name)
        if self.spec.taps:
            y, state = convolved_heads(y, info, state, self.kernel_of(name))
        return self.finished(y, name), state

    def raw(self, x: Float[Array, "B T M"], name: str) -> Float[Array, "B T H D"]:
        """The projection to queries, keys or values."""
        return self._project(x, getattr(self, name))

    def kernel_of(self, name: str) -> Float[Array, "taps H D"]:
        """Of the convolution behind a projection."""
        return getattr(self, f"{name}_kernel")[...]

    def finished(self, y: Float[Array, "B T H D"], name: str) -> Float[Array, "B T H D"]:
        """q, k or v of what the convolution gave."""
        y = self._whole(jax.nn.silu(y))
        return y if name == "value" else y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)

    def init_state(self, batch_size, length):
        spec, compute = self.spec, self.inherited.compute
        size = spec.heads * spec.head_dim
        local = lambda: empty_convolution(batch_size, spec.taps - 1, size, compute) if spec.taps else None
        memory = first_state(self.kind, self.first, self.no_gates, batch_size, spec.chunk)
        return NeuralMemoryState(memory=memory, query=local(), key=local(), value=local())


def mean_error(loss: Float[Array, "B T H"], real: Float[Array, "B T H"]) -> Float[Array, ""]:
    """Of the tokens that are real: a metric of the memory's health."""
    return jax.lax.stop_gradient(jnp.sum(jnp.where(real > 0, loss, 0)) / jnp.maximum(real.sum(), 1))


def _first_bias(name: str, rngs: nnx.Rngs, heads: int) -> Float[Array, "H"]:
    """Of a forgetting from 1 token in 1,000 to 1 in 10, of a momentum and a step of half their range."""
    if name != "keep":
        return jnp.zeros(heads)
    low, high = math.log(1e-3), math.log(1e-1)
    first = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high))
    return jnp.log(first) - jnp.log1p(-first)


def _coefficients(step, log_keep, log_momentum, real, *, gradient):
    return decayed(step, log_keep, log_momentum, real > 0, gradient=gradient)
