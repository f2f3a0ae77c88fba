"""Fast weights in chunks give what titans-pytorch, flash-linear-attention's plain forms and TTT's authors give.

Run in float64; the arrays are held as float32.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import titans as peer

from pallas_kernels.fast_weight.coefficients import decayed, mini_batch, pooled
from pallas_kernels.fast_weight.network import Fixed, Network, Weights
from pallas_kernels.fast_weight.op import FastWeight, State, fast_weight

GOLDEN = Path(__file__).parent / "golden"


def held(name: str, case: str) -> dict[str, jax.Array]:
    with np.load(GOLDEN / f"{name}.npz") as found:
        return {
            key.removeprefix(f"{case}/"): jnp.asarray(found[key], jnp.float64) for key in found if key.startswith(f"{case}/")
        }


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def close(found, wanted, tolerance=2e-6):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


def test_coefficients_of_titans():
    given = held("delta_rules", "titans")
    made = decayed(given["theta"], jnp.log1p(-given["alpha"]), jnp.log(given["eta"]))
    close(made.read.keep, given["beta"])
    close(made.read.carry, given["f"])
    close(made.read.gain, given["G"])
    for found, name in zip(made.state, ("beta_last", "f_last", "g_last"), strict=True):
        close(jnp.squeeze(found, 2), given[name])
    close(made.momentum.carry[..., 0], given["momentum_last"])
    close(made.momentum.gain[..., 0, :], given["n_last"])


@pytest.mark.parametrize("chunk", [4, 11])
def test_gated_delta_rule(chunk):
    given = held("delta_rules", "gated")
    coefficients = functools.partial(decayed, gradient="decayed")

    def run(q, k, v, beta, log_decay, start):
        state = State(Weights((start,)), Weights((jnp.zeros_like(start),)))
        out, state, _ = fast_weight(FastWeight(Network(), coefficients), state, q / 2, k, v, (beta, log_decay), chunk=chunk)
        return (out * given["cotangent"]).sum(), (out, state.weights.matrices[0])

    names = "q", "k", "v", "beta", "log_decay", "start"
    arrays = [given[name] for name in names]
    gradients, (out, state) = jax.jit(jax.grad(run, argnums=tuple(range(6)), has_aux=True))(*arrays)
    close(out, given["out"])
    close(state, given["state"])
    for name, gradient in zip(names, gradients, strict=True):
        close(gradient, given[f"d{name}"])


def test_delta_rule():
    given = held("delta_rules", "delta")
    nothing = Weights((jnp.zeros((2, 2, 4, 6)),))
    coefficients = functools.partial(decayed, gradient="previous")
    arrays = [given[name] for name in ("q", "k", "v")]
    run = jax.jit(functools.partial(fast_weight, FastWeight(Network(), coefficients), chunk=5))
    out, state, _ = run(State(nothing), arrays[0] / 2, *arrays[1:], (given["beta"],))
    close(out, given["out"])
    close(state.weights.matrices[0], given["state"])


@pytest.mark.parametrize("case, names", [("linear", "1"), ("mlp", "12")])
def test_ttt(case, names):
    """Rates come as products of a row's and a column's factor."""
    given = held("ttt_layers", case)
    eta = jnp.moveaxis(given["eta"], 2, 1)  # [B,n,H,i,j]
    row, column = eta[..., :, 0] / eta[..., :1, 0], eta[..., 0, :]
    tokens = lambda x: jnp.moveaxis(x, 3, 2).reshape(2, 8, 2)
    q, k, v = (jnp.moveaxis(given[name], 1, 2) for name in "qkv")
    rows = lambda x: jnp.broadcast_to(x, (2, *x.shape))
    start = Weights(
        tuple(rows(given[f"weights/W{n}"]) for n in names), tuple(rows(given[f"weights/b{n}"][:, 0]) for n in names)
    )
    fixed = Fixed(given["weights/ttt_norm_weight"], given["weights/ttt_norm_bias"])
    network = Network(activation="gelu_tanh", output="norm", eps=1e-6)
    state = State(start, jax.tree.map(jnp.zeros_like, start))
    run = jax.jit(functools.partial(fast_weight, FastWeight(network, mini_batch, fixed), chunk=4))
    out, state, _ = run(state, q, k, v, (tokens(row), tokens(column)))
    close(out.reshape(2, 8, 8), given["inner"][:, :8])
    for n, name in enumerate(names):
        close(state.weights.matrices[n], given[f"state/W{name}"])
        close(state.weights.biases[n], given[f"state/b{name}"][:, :, 0])


SLOW = "linear", "no_momentum"  # the others have all that they have


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in peer.CASES])
def test_titans_pytorch(case):
    """The whole of its module around the memory is written out here."""
    heads, _, _, batch, width, length, momentum, _ = peer.CASES[case]
    given = held("titans", case)
    weight = lambda name: given[f"weights/{name}"]
    in_heads = lambda x: x.reshape(2, length, heads, -1)
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 2.2e-16)
    blocks = length // width
    mean = lambda u: u[:, : blocks * width].reshape(2, blocks, width, -1).mean(axis=2)
    gate = lambda u, name: u @ weight(f"{name}.0.weight").T + weight(f"{name}.0.bias")
    count = sum(name.startswith("weights/memory_model_parameters") for name in given)
    fast = [
        jnp.broadcast_to(weight(f"memory_model_parameters.{n}"), (2, *weight(f"memory_model_parameters.{n}").shape))
        for n in range(count)
    ]
    state = State(*[Weights(tuple(part[1:]), (), part[0]) for part in (fast, [jnp.zeros_like(x) for x in fast])])
    dim = 8 // heads

    def coefficients(step, log_keep, log_momentum):
        every = lambda x: None if x is None else x[..., ::width]
        return pooled(step, every(log_keep), every(log_momentum), width=width)

    def run(x):
        u, r = norm(x) * weight("store_norm.weight"), norm(x) * weight("retrieve_norm.weight")
        k, v, q = (in_heads(y @ weight(f"to_{n}.weight").T) for y, n in ((u, "keys"), (u, "values"), (r, "queries")))
        step = 2 / dim * 0.3 * jax.nn.sigmoid(gate(u, "to_adaptive_step"))
        spread = lambda x: jnp.pad(jnp.repeat(x, width, axis=1), ((0, 0), (0, length - blocks * width), (0, 0)))
        log_keep = spread(jax.nn.log_sigmoid(-gate(mean(u), "to_decay_factor")))
        log_momentum = spread(jax.nn.log_sigmoid(gate(mean(u), "to_momentum"))) if momentum else None
        kind, gates = FastWeight(Network(output="gain"), coefficients), (step, log_keep, log_momentum)
        out, behind, loss = fast_weight(kind, state, q, k, v, gates, chunk=batch)
        if heads > 1:
            out = out * jax.nn.sigmoid(r @ weight("retrieve_gate.0.weight").T)[..., None]
        out = out.reshape(2, length, 8)
        return ((out @ weight("combine_heads.weight").T if heads > 1 else out) * given["cotangent"]).sum(), (out, behind, loss)

    dx, (out, behind, loss) = jax.jit(jax.grad(run, has_aux=True))(given["x"])
    out = out @ weight("combine_heads.weight").T if heads > 1 else out
    close(out, given["out"])
    close(dx, given["dx"], 1e-5)
    close(jnp.moveaxis(loss, 2, 1)[..., : blocks * width] * 2 / dim, given["surprise"])
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    for part, name in ((behind.weights, "state"), (behind.momentum, "momentum"))[: 2 if momentum else 1]:
        close(flat(part.gain), given[f"{name}/norm.gamma"])
        for n, matrix in enumerate(part.matrices):
            close(flat(matrix), given[f"{name}/model.weights.{n}"])
