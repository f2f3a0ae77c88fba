"""The GPU kernels of fast weights, interpreted, equal the XLA form to 1e-5, and they lower to Triton for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import described

from lcx.parallel.mesh import MeshSpec
from pallas_kernels.fast_weight import gpu
from pallas_kernels.fast_weight.coefficients import decayed, mini_batch
from pallas_kernels.fast_weight.network import Network, Weights
from pallas_kernels.fast_weight.op import Course, FastWeight, State, fast_weight
from pallas_kernels.fast_weight.tpu import Given, Rule


def of_gates(step, keep, momentum, real, *, gradient="start"):
    return decayed(step, keep, momentum, real > 0, gradient=gradient)


CASES = {  # what it is, momentum
    "linear attention": (FastWeight(Network(target="hebbian"), of_gates), False),
    "gated DeltaNet": (FastWeight(Network(), functools.partial(of_gates, gradient="decayed")), False),
    "delta with momentum": (FastWeight(Network(), functools.partial(of_gates, gradient="previous")), True),
    "Titans": (FastWeight(Network(), of_gates, overshoot=1.0), True),
    "TTT without norm": (FastWeight(Network(), lambda step, *_: mini_batch(step, step)), False),
}
COURSE = Course(
    begins=jnp.array([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]], bool),
    whole=jnp.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0]], bool),
    live=jnp.array([1, 1, 1, 1, 0], bool),
    first=None,
)


def given(momentum: bool, length: int, D: int, E: int, rows: int = 2, heads: int = 2):
    """Arrays: state, first, q, k, v, gates."""
    draws = iter(jax.random.split(jax.random.key(0), 20))
    draw = lambda *shape: jax.random.normal(next(draws), shape) / 2
    state = lambda *lead: State(Weights((draw(*lead, D, E),)), Weights((draw(*lead, D, E),)) if momentum else None)
    uniform = lambda low, high: jax.random.uniform(next(draws), (rows, length, heads), minval=low, maxval=high)
    real = jnp.ones((rows, length, heads)).at[1, 3:5].set(0)
    gates = (uniform(0.1, 0.5), jnp.log(uniform(0.5, 1)), jnp.log(uniform(0.2, 0.9)) if momentum else None, real)
    q, k, v = (draw(rows, length, heads, size) for size in (D, D, E))
    return state(rows, heads), state(heads), q, k * D**-0.5, v, gates


def compared(name: str, chunk: int, D: int, E: int, course: Course | None, mesh: bool = False):
    """Outputs of both forms, the kernel perhaps on a mesh, and all gradients; three chunks and some tokens without a course."""
    kind, momentum = CASES[name]
    arrays = given(momentum, 3 * chunk + 3 if course is None else course.begins.shape[1] * chunk, D, E)

    def found(arrays, form):
        state, first, *rows, gates = arrays
        flow = None if course is None else course._replace(first=first)
        outputs = fast_weight(
            kind, state, *rows, gates, chunk=chunk, kept=3, course=flow, form=form, axes=(("data",), ("tensor",))
        )
        rng = np.random.default_rng(1)
        return sum(jnp.sum(x * rng.normal(size=x.shape)) for x in jax.tree.leaves(outputs)), outputs

    both = []
    for form in ("gpu", "xla"):
        devices = MeshSpec(data=2, tensor=2).build() if mesh and form == "gpu" else MeshSpec().build()
        with jax.set_mesh(devices):
            run = jax.jit(jax.value_and_grad(functools.partial(found, form=form), has_aux=True))
            assert ("pallas_call" in str(run.trace(arrays).jaxpr)) == (form == "gpu")
            both.append(run(arrays))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), rtol=0)


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", ["gated DeltaNet", "Titans", *slow("linear attention", "delta with momentum", "TTT without norm")]
)
def test_documents_equal_the_xla_form(name):
    """A group of three chunks and one of two; chunks that begin a document, are not whole, have no tokens."""
    compared(name, 16, 16, 32, COURSE)


@pytest.mark.parametrize("name", ["gated DeltaNet", *slow("Titans")])
def test_one_run_equals_the_xla_form(name):
    """Columns in several programs, rows in two parts; the last tokens are no chunk."""
    compared(name, 32, 128, 32, None)


@pytest.mark.slow
def test_rows_and_heads_are_shared_out_over_a_mesh():
    compared("gated DeltaNet", 16, 16, 48, COURSE, mesh=True)


def shapes_of(name: str, chunk: int, dim: int) -> Given:
    """Of `gpu.group` for three chunks."""
    kind, momentum = CASES[name]
    state, first, *rows, gates = jax.eval_shape(functools.partial(given, momentum, 3 * chunk, dim, dim))
    cut = lambda x: jax.ShapeDtypeStruct((3, 2, 2, chunk, *x.shape[3:]), jnp.float32)
    rows, gates = jax.tree.map(cut, (rows, gates))
    return Given(tuple(state), tuple(first), None, (*rows, jax.eval_shape(kind.coefficients, *gates)))


def rule_of(name: str) -> Rule:
    kind, _ = CASES[name]
    return Rule(kind.network, kind.overshoot, kind.norm)


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("name", ["gated DeltaNet", "Titans"])
def test_lowers_for_cuda(name, dim, chunk):
    """One Triton kernel forward, and one backward."""
    flags = jax.ShapeDtypeStruct((3, 3, 2), jnp.int32)

    def value(shapes, flags):
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(gpu.group(rule_of(name), shapes, flags)))

    for run, kernels in ((value, 1), (jax.grad(value), 2)):
        text = jax.jit(run).trace(shapes_of(name, chunk, dim), flags).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("xla.gpu.triton") == kernels


def test_what_is_refused():
    rule, given = rule_of("Titans"), shapes_of("Titans", 16, 32)
    weights, momentum = given.state
    deep = given._replace(state=(Weights(weights.matrices * 2), momentum))
    biased = given._replace(state=(weights._replace(biases=weights.matrices), momentum))
    assert gpu.refused(rule, given, 3) is gpu.refused(rule, shapes_of("gated DeltaNet", 64, 256), 3) is None
    for reason, rule_, given_ in (
        ("2 matrices", rule, deep),
        ("biases", rule, biased),
        ("'norm'", rule._replace(network=Network(output="norm")), given),
        ("norm = 3.0", rule._replace(norm=3.0), given),
        ("chunks of 24 tokens", rule, shapes_of("Titans", 24, 32)),
        ("chunks of 128 tokens", rule, shapes_of("Titans", 128, 32)),
        ("a matrix of 48 by 48", rule, shapes_of("Titans", 16, 48)),
        ("a matrix of 256 by 256", rule, shapes_of("Titans", 16, 256)),
        ("wider", rule, jax.tree.map(lambda x: x.update(dtype=jnp.float64), given)),
    ):
        assert reason in gpu.refused(rule_, given_, 3)


def test_a_kernel_that_is_named_is_taken_or_refused_and_nothing_else_chooses_it():
    """On a GPU too, until one has timed it."""
    state, _, *rows, gates = given(True, 32, 16, 16)
    run = lambda kind, form: jax.make_jaxpr(lambda: fast_weight(kind, state, *rows, gates, chunk=16, form=form)[0])()
    kind, _ = CASES["Titans"]
    assert "pallas_call" in str(run(kind, "gpu"))
    with pytest.raises(ValueError, match=r"form = 'gpu': norm = 3\.0"):
        run(kind._replace(norm=3.0), "gpu")
    with described("NVIDIA H100 80GB HBM3"):
        assert "pallas_call" not in str(run(kind, None))
