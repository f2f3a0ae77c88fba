"""The TPU kernel of fast weights, interpreted, equals the XLA form: outputs, state and all gradients to 1e-5."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.parallel.mesh import MeshSpec
from pallas_kernels.fast_weight.coefficients import decayed, mini_batch
from pallas_kernels.fast_weight.network import Fixed, Network, Weights
from pallas_kernels.fast_weight.op import Course, FastWeight, State, fast_weight
from pallas_kernels.fast_weight.triangular import solved

B, H, CHUNK, D = 2, 2, 8, 8


def of_gates(step, keep, momentum, real, *, gradient="start"):
    return decayed(step, keep, momentum, real > 0, gradient=gradient)


CASES = {  # network, depth, biases, coefficients, momentum, overshoot, norm
    "titans": (Network(output="gain"), 2, False, of_gates, True, 1.0, 3.0),
    "deep": (Network(), 4, False, of_gates, True, 1.0, 3.0),
    "ttt": (
        Network(activation="gelu_tanh", output="norm"),
        2,
        True,
        lambda step, *_: mini_batch(step, step),
        False,
        None,
        None,
    ),
    "hebbian": (Network(target="hebbian"), 1, False, of_gates, False, None, None),
    "delta": (Network(), 1, False, functools.partial(of_gates, gradient="decayed"), False, None, None),
    "delta with momentum": (Network(), 1, False, functools.partial(of_gates, gradient="previous"), True, None, None),
}


def kind_of(name: str, fixed=None) -> FastWeight:
    network, _, _, build, _, overshoot, norm = CASES[name]
    return FastWeight(network, build, fixed, overshoot, norm)


def given(name: str, length: int, rows: int = B, heads: int = H, dim: int = D, expand: int = 2):
    """Arrays: state, first, fixed, q, k, v, gates."""
    network, depth, biases, _, momentum, *_ = CASES[name]
    draws = iter(jax.random.split(jax.random.key(0), 100))
    draw = lambda *shape: jax.random.normal(next(draws), shape) / 2
    sizes = list(itertools.pairwise([dim, *[expand * dim] * (depth - 1), dim]))
    weights = lambda *lead: Weights(
        tuple(draw(*lead, *size) for size in sizes),
        tuple(draw(*lead, size[1]) for size in sizes) if biases else (),
        draw(*lead, dim) if network.output == "gain" else None,
    )
    state = lambda *lead: State(weights(*lead), weights(*lead) if momentum else None)
    fixed = Fixed(draw(heads, dim), draw(heads, dim)) if network.output == "norm" else None
    qkv = [draw(rows, length, heads, dim) for _ in range(3)]
    uniform = lambda low, high: jax.random.uniform(next(draws), (rows, length, heads), minval=low, maxval=high)
    real = jnp.ones((rows, length, heads)).at[1, 3:5].set(0)
    gates = (uniform(0.1, 0.5), jnp.log(uniform(0.5, 1)), jnp.log(uniform(0.2, 0.9)) if momentum else None, real)
    return state(rows, heads), state(heads), fixed, *qkv, gates


def compared(name: str, n: int, course, mesh: bool = False):
    """Outputs of both forms, the kernel perhaps on a mesh, and all gradients; n chunks and, without a course, 3 tokens."""
    length = n * CHUNK + (3 if course is None else 0)
    arrays = given(name, length)

    def found(arrays, form):
        state, first, fixed, *rows, gates = arrays
        flow = None if course is None else course._replace(first=first)
        run = functools.partial(fast_weight, kind_of(name, fixed), chunk=CHUNK, kept=2, course=flow, form=form, axes=axes)
        outputs = run(state, *rows, gates)
        rng = np.random.default_rng(1)
        return sum(jnp.sum(x * rng.normal(size=x.shape)) for x in jax.tree.leaves(outputs)), outputs

    axes = ("data",), ("tensor",)
    both = []
    for form in ("tpu", "xla"):
        devices = MeshSpec(data=2, tensor=2).build() if mesh and form == "tpu" else MeshSpec().build()
        with jax.set_mesh(devices):
            both.append(jax.jit(jax.value_and_grad(functools.partial(found, form=form), has_aux=True))(arrays))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), rtol=0)


COURSE = Course(
    begins=jnp.array([[1, 0, 0, 1, 0], [1, 0, 1, 0, 0]], bool),
    whole=jnp.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 0]], bool),
    live=jnp.array([1, 1, 1, 1, 0], bool),
    first=None,
)


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["delta", *slow("titans", "ttt", "deep", "hebbian")])
def test_documents_equal_the_xla_form(name):
    """Groups of two chunks and a last one alone; chunks that begin a document, are not whole, have no tokens."""
    compared(name, 5, COURSE)


@pytest.mark.parametrize("name", slow("delta with momentum", "titans"))
def test_one_run_equals_the_xla_form(name):
    compared(name, 3, None)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_triangular_systems_are_solved_without_powers(size):
    """Of all ones, whose powers reach 1e8: rows minus the row above."""
    lower, rows = (
        jnp.tril(jnp.ones((size, size)), -1),
        jnp.asarray(np.random.default_rng(0).normal(size=(size, 3)), jnp.float32),
    )
    by_substitution = lambda lower, rows: jax.scipy.linalg.solve_triangular(
        jnp.eye(size) + lower, rows, lower=True, unit_diagonal=True
    )
    for found, wanted in zip(*(jax.vjp(f, lower, rows) for f in (solved, by_substitution)), strict=True):
        if callable(found):
            found, wanted = found(rows), wanted(rows)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(initial=1))


def test_rows_and_heads_are_shared_out_over_a_mesh():
    """Two by two devices: what one device finds, the gradients of weights that rows share included."""
    compared("ttt", 2, COURSE._replace(begins=COURSE.begins[:, :2], whole=COURSE.whole[:, :2], live=COURSE.live[:2]), mesh=True)
