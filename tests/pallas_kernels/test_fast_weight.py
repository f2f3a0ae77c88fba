"""A fast weight in chunks equals the recurrence as it is written: value, state and networks' gradients, float64 to 1e-10."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fast_weight.chunks import chunk
from pallas_kernels.fast_weight.coefficients import decayed, mini_batch
from pallas_kernels.fast_weight.network import Fixed, Network, Weights
from pallas_kernels.fast_weight.op import FastWeight, State, fast_weight
from pallas_kernels.fast_weight.reference import recur

T, D, E, F = 5, 3, 4, 5


def given(network: Network, depth: int, biases: bool, seed: int = 0):
    """(weights, fixed, q, k, v, step, keep, momentum) of one head in float64."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    last = D if network.output != "plain" else E
    sizes = list(itertools.pairwise([D, *[F] * (depth - 1), last]))
    weights = Weights(
        tuple(draw(*size) for size in sizes),
        tuple(draw(size[1]) for size in sizes) if biases else (),
        draw(last) if network.output == "gain" else None,
    )
    fixed = Fixed(draw(last), draw(last)) if network.output == "norm" else None
    step, keep, momentum = (jnp.asarray(rng.uniform(low, high, T)) for low, high in ((0.1, 0.5), (0.5, 1), (0.2, 0.9)))
    return weights, fixed, draw(T, D), draw(T, D), draw(T, last), step, keep, momentum


NETWORKS = {
    "linear": (Network(), 1, False),
    "hebbian": (Network(target="hebbian"), 1, False),
    "mlp": (Network(), 2, False),
    "deep": (Network(activation="silu"), 4, True),
    "ttt": (Network(activation="gelu_tanh", output="norm", eps=1e-6), 2, True),
    "titans": (Network(output="gain"), 2, False),
}


def mostly(*fast):
    """All networks, but `fast` in the slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]


@pytest.mark.parametrize("name", mostly("linear", "hebbian", "ttt"))
def test_a_chunk_equals_the_recurrence(name):
    """With decay and momentum, from a momentum that is not zero; the gradient through the inner gradients as well."""
    network, depth, biases = NETWORKS[name]
    with jax.enable_x64(True):
        weights, fixed, q, k, v, step, keep, momentum = given(network, depth, biases)
        carried = jax.tree.map(lambda w: w / 3, weights)
        cotangent = jax.random.normal(jax.random.key(0), v.shape, jnp.float64)

        def fast(weights, carried, q, k, v, step, keep, momentum):
            made = decayed(step, jnp.log(keep), jnp.log(momentum))
            out, *state, _, _ = chunk(network, weights, carried, made, q, k, v, fixed)
            return (out * cotangent).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(state)), (out, state)

        def slow(weights, carried, q, k, v, step, keep, momentum):
            gates = {"step": step, "keep": keep, "momentum": momentum}
            out, *state = recur(network, weights, q, k, v, **gates, chunk=T, fixed=fixed, carried=carried)
            return (out * cotangent).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(state)), (out, state)

        arrays = (weights, carried, q, k, v, step, keep, momentum)
        found, wanted = (jax.jit(jax.grad(f, argnums=tuple(range(8)), has_aux=True))(*arrays) for f in (fast, slow))
        assert_close(found, wanted, 1e-10)


@pytest.mark.parametrize("gradient", ["previous", "decayed"])
@pytest.mark.parametrize("with_momentum", [False, True])
def test_delta_rules_equal_the_recurrence(gradient, with_momentum):
    network = Network()
    with jax.enable_x64(True):
        weights, _, q, k, v, step, keep, momentum = given(network, 1, False, seed=1)
        carried = jax.tree.map(lambda w: w / 3 * with_momentum, weights)
        going = momentum if with_momentum else None
        gates = {"step": step, "keep": keep, "momentum": going}
        wanted = jax.jit(lambda q: recur(network, weights, q, k, v, **gates, gradient=gradient, carried=carried))(q)
        logs = jnp.log(keep), None if going is None else jnp.log(going)
        made = functools.partial(decayed, step, *logs, gradient=gradient)
        found = jax.jit(lambda q: chunk(network, weights, carried, made(), q, k, v)[:3])(q)
        assert_close(found[:2], wanted[:2], 1e-12)
        if with_momentum:
            assert_close(found[2], wanted[2], 1e-12)


@pytest.mark.slow
def test_rows_in_chunks_equal_the_recurrence():
    """Chunks of 2 in rows of 5, groups of two of them, two rows of two heads."""
    network = NETWORKS["ttt"][0]
    made = [given(network, 2, True, seed) for seed in range(4)]
    stack = lambda *leaves: jnp.stack(leaves).reshape(2, 2, *leaves[0].shape).astype(jnp.float32)
    weights, fixed, q, k, v, step, keep, momentum = jax.tree.map(stack, *made)
    fixed = jax.tree.map(lambda x: x[0], fixed)  # of the heads
    tokens = lambda x: jnp.moveaxis(x, 2, 1)
    run = jax.jit(functools.partial(fast_weight, FastWeight(network, coefficients, fixed), chunk=2, kept=2))
    gates = tuple(map(tokens, (step, jnp.log(keep), jnp.log(momentum))))
    state = State(weights, jax.tree.map(jnp.zeros_like, weights))
    out, behind, _ = run(state, *map(tokens, (q, k, v)), (*gates, jnp.ones_like(gates[0])))
    for row, head in itertools.product(range(2), range(2)):
        mine = jax.tree.map(lambda x, row=row, head=head: x[row, head], (weights, q, k, v, step, keep, momentum))
        gates_of = dict(zip(("step", "keep", "momentum"), mine[4:], strict=True))
        own = jax.tree.map(lambda x, head=head: x[head], fixed)
        wanted = recur(network, *mine[:4], **gates_of, chunk=2, fixed=own)
        assert_close(
            (out[row, :, head], *jax.tree.map(lambda x, row=row, head=head: x[row, head], tuple(behind))), wanted, 2e-4
        )


def coefficients(step, log_keep, log_momentum, real):
    return decayed(step, log_keep, log_momentum, real > 0)


def test_without_momentum_nothing_is_carried():
    network = NETWORKS["titans"][0]
    weights, _, q, k, v, step, keep, _ = jax.tree.map(lambda x: x.astype(jnp.float32), given(network, 2, False))
    run = jax.jit(lambda carried: chunk(network, weights, carried, decayed(step, jnp.log(keep)), q, k, v))
    out, behind, carried, *_ = run(None)
    wanted = run(jax.tree.map(jnp.zeros_like, weights))
    assert carried is None
    assert_close((out, behind), wanted[:2], 1e-6)


def test_products_are_of_float32_on_every_platform():
    weights, _, q, k, v, step, keep, momentum = jax.tree.map(lambda x: x.astype(jnp.float32), given(Network(), 2, False))
    with jax.default_matmul_precision("default"):
        made = lambda *gates: decayed(*gates, gradient="previous")
        run = lambda w, *rows: chunk(Network(), w, w, made(step, keep, momentum), *rows)
        linear = Weights(weights.matrices[:1])
        texts = [
            str(jax.make_jaxpr(run)(linear, q, k, v[:, :1] * jnp.ones(F, jnp.float32))),
            str(jax.make_jaxpr(lambda *a: chunk(Network(), *a[:2], decayed(step), *a[2:]))(weights, weights, q, k, v)),
        ]
    for text in texts:
        assert text.count("dot_general") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 3


def test_what_is_not_real_changes_nothing():
    """Tokens between which padding stands read and leave what they do without, in one chunk."""
    network = NETWORKS["mlp"][0]
    with jax.enable_x64(True):
        weights, _, q, k, v, step, keep, momentum = given(network, 2, False, seed=2)
        carried = jax.tree.map(lambda w: w / 3, weights)
        run = jax.jit(lambda q, k, v, *gates: chunk(network, weights, carried, decayed(*gates), q, k, v)[:3])
        wanted = run(q, k, v, step, jnp.log(keep), jnp.log(momentum))
        places = jnp.array([1, 2, 4, 6, 7])
        wide = lambda x: jnp.full((9, *x.shape[1:]), 0.7).at[places].set(x)
        real = jnp.zeros(9, bool).at[places].set(True)
        found = run(*map(wide, (q, k, v, step, jnp.log(keep), jnp.log(momentum))), real)
        assert_close((found[0][places], *found[1:]), wanted, 1e-12)


def test_a_forgotten_state_is_gone_and_later_ones_are_exact():
    """Behind a factor of 0 nothing of before is left, and what follows is as if it stood alone, to float32's rounding."""
    network = Network(target="hebbian")
    weights, _, q, k, v, step, keep, _ = jax.tree.map(lambda x: x.astype(jnp.float32), given(network, 1, False, seed=3))
    nothing = jax.tree.map(jnp.zeros_like, weights)
    logs = jnp.log(keep).at[3].set(-1e9)
    run = jax.jit(lambda weights, step, logs, *rows: chunk(network, weights, None, decayed(step, logs), *rows)[:2])
    out, behind = run(weights, step, logs, q, k, v)
    part = slice(3, None)
    alone, left = run(nothing, *(x[part] for x in (step, jnp.log(keep), q, k, v)))
    assert_close((out[part], behind), (alone, left), 1e-6)


@pytest.mark.parametrize("name", ["linear", "titans", "deep"])
def test_bounded_steps_do_not_overshoot(name):
    """Twelve times one key and value in one chunk at steps of 1: the error grows without a bound, and falls with one."""
    network, depth, biases = NETWORKS[name]
    weights, fixed, _, k, v, *_ = jax.tree.map(lambda x: x.astype(jnp.float32), given(network, depth, biases))
    k, v = (jnp.broadcast_to(x[0] / jnp.linalg.norm(x[0]), (12, x.shape[1])) for x in (k, v))
    if network.output == "gain":
        weights = weights._replace(gain=jnp.zeros_like(weights.gain))
    made = decayed(jnp.ones(12))
    run = lambda most: jax.jit(lambda k: chunk(network, weights, None, made, k, k, v, fixed, overshoot=most)[0])(k)
    errors = {most: np.sum((np.asarray(run(most)) - v) ** 2, axis=-1) for most in (None, 1.0)}
    before = np.sum((np.asarray(network(weights, k, fixed)) - v) ** 2, axis=-1)
    assert errors[None][-1] > before[-1]
    assert (errors[1.0] < before).all()


def test_mini_batches_are_products_of_rows_and_columns():
    row, column = np.arange(1.0, 4), np.arange(4.0, 7)
    made = mini_batch(jnp.asarray(row), jnp.asarray(column))
    np.testing.assert_array_equal(made.read.gain, np.tril(np.outer(row, column)))
    np.testing.assert_array_equal(made.state.gain[0], 3 * column)
    assert made.gradient is None and float(made.state.keep[0]) == 1 and not made.momentum.gain.any()


def assert_close(found, wanted, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)
