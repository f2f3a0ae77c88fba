"""The training step: accumulation equals one batch, every mesh equals one device, weights decide and not batch shapes."""

import itertools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lcx.objectives.language_modeling import LanguageModeling
from lcx.parallel.mesh import AXES, MeshSpec
from lcx.parallel.rules import Rules
from lcx.spec import SpecError, edit
from lcx.training.optimizer import AdamW
from lcx.training.placement import host_rows, place_batch
from lcx.training.schedules import Constant
from lcx.training.step import TrainStep

PAIRS = [MeshSpec(**{a: 2, b: 4 if a == "data" and b == "context" else 2}) for a, b in itertools.combinations(AXES, 2)]
SLOW = "data-fsdp", "data-context", "data-tensor", "fsdp-context", "context-tensor"  # what they share out, other pairs do too


def step_of(decoder, mesh=None, **options):
    """Without clipping and with beta1 = 0.75, the first moment after one update is a quarter of the gradient."""
    optimizer = AdamW(learning_rate=Constant(peak=1e-3), beta1=0.75, clip=None)
    objective = LanguageModeling(chunk=5, z_loss=1e-3)
    mesh = (mesh or MeshSpec()).build()
    return TrainStep(model=decoder, objective=objective, optimizer=optimizer, mesh=mesh, steps=10, **options)


def first_updates(step, params, *batches):
    """(gradient, results, state) of the first update, from the same parameters on each of the batches."""
    placed = [place_batch(batch, step.spec.rules, step.mesh) for batch in batches]
    compiled, found = step.compile(placed[0]), []
    for batch in placed:
        state, results = compiled(step.start(jax.device_put(params, step.shardings.params)), batch)
        gradient = jax.tree.map(lambda moment: 4 * np.asarray(moment), state.optimizer[1][0].mu)
        found.append((gradient, jax.tree.map(float, results), state))
    return found


@pytest.fixture(scope="module")
def params(decoder):
    return jax.tree.map(np.asarray, step_of(decoder, seed=3).init().params)


@pytest.fixture(scope="module")
def on_one(decoder, params, batch):
    """The update on one device: of the batch, of its first half, and of that half with three times the weights."""
    half = np.where(np.arange(8)[:, None] < 4, batch.loss_weights, 0)
    return first_updates(step_of(decoder), params, batch, reweighted(batch, half), reweighted(batch, 3 * half))


def reweighted(batch, weights):
    leaves = [weights if leaf is batch.loss_weights else leaf for leaf in jax.tree.leaves(batch)]
    return jax.tree.unflatten(jax.tree.structure(batch), leaves)


def assert_same(found, wanted):
    """Gradients within 5e-6 of the largest entry (1.1e-6 measured), sums within 1e-6 of their value."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted[0]))
    for got, want in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0]), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6 * largest)
    for got, want in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_accumulation_equals_one_big_batch(decoder, params, batch, on_one):
    assert_same(*first_updates(step_of(decoder, accumulation=4), params, batch), on_one[0])


def named(mesh):
    name = "-".join(axis for axis in AXES if getattr(mesh, axis) > 1)
    return pytest.param(mesh, id=name, marks=pytest.mark.slow if name in SLOW else ())


@pytest.mark.parametrize("mesh", [named(mesh) for mesh in PAIRS])
def test_every_pair_of_axes_equals_one_device(decoder, params, batch, on_one, mesh):
    step = step_of(decoder, mesh, accumulation=2 if mesh.data == 1 else 1)
    (found,) = first_updates(step, params, batch)
    assert_same(found, on_one[0])
    for leaf, sharding in zip(jax.tree.leaves(found[2]), jax.tree.leaves(step.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_gradient_is_that_of_the_weighted_mean(on_one):
    """Weights count relative to their sum; the sum itself grows."""
    _, half, tripled = on_one
    assert tripled[1]["sums"]["loss_sum"] == pytest.approx(3 * half[1]["sums"]["loss_sum"], rel=1e-6)
    for got, want in zip(jax.tree.leaves(tripled[0]), jax.tree.leaves(half[0]), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_rows_without_weight_change_nothing(decoder, params, batch, on_one):
    first = jax.tree.map(lambda leaf: leaf[:4], batch)
    assert_same(*first_updates(step_of(decoder), params, first), on_one[1])


def test_initial_parameters_do_not_depend_on_the_mesh(decoder, params):
    found = step_of(decoder, MeshSpec(fsdp=4, tensor=2), seed=3).init().params
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_parameters_and_moments_are_spread_over_the_devices(decoder):
    """On 4 x 2 devices a matrix of width x hidden holds an eighth of its entries on each."""
    abstract = step_of(decoder, MeshSpec(fsdp=4, tensor=2)).abstract_state()
    for tree in (abstract.params, abstract.optimizer[1][0].mu, abstract.optimizer[1][0].nu):
        up = tree["slots"][0]["channel"]["up"]
        assert up.sharding.shard_shape(up.shape) == (2, 8 // 4, 16 // 2)


def test_rows_and_parameters_that_do_not_divide_are_refused(decoder):
    with pytest.raises(SpecError, match="batch_size 6 does not divide"):
        host_rows(6, Rules(), MeshSpec(data=2, fsdp=2).build())
    with pytest.raises(SpecError, match=r"slots/0/mixer/key of shape .* does not divide over mesh {'tensor': 4}"):
        step_of(edit(decoder, "vocab", 64), MeshSpec(tensor=4))


def test_rows_of_one_process_are_all_rows():
    assert host_rows(8, Rules(), MeshSpec(data=2, context=2).build()) == (0, 1)


def test_frozen_parameters_keep_their_bits_and_have_no_optimizer_state(decoder, params, batch, on_one):
    """What is trained gets the gradient that it gets when all is, over micro-batches as well."""
    step = step_of(decoder, trainable=("slots/*/channel/*", "final_norm/*"), accumulation=2)
    gradient, results, state = first_updates(step, params, batch)[0]
    whole, before, after = flatten_dict(on_one[0][0]), flatten_dict(params), flatten_dict(state.params)
    gradient = flatten_dict(gradient)
    trained = {path for path in before if "channel" in path or path[0] == "final_norm"}
    assert set(gradient) == trained and 0 < len(trained) < len(before)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradient.values()))
    np.testing.assert_allclose(results["values"]["gradient_norm"], norm, rtol=1e-5)
    for path, leaf in before.items():
        same = np.array_equal(leaf, after[path])
        assert same != (path in trained)
        if path in trained:
            np.testing.assert_allclose(gradient[path], whole[path], atol=5e-6 * max(np.abs(x).max() for x in whole.values()))


@pytest.mark.parametrize(
    "patterns, message", [(("slots/nothing",), "'slots/nothing' matches no parameter"), ((), "at least one")]
)
def test_patterns_that_train_nothing_are_refused(decoder, patterns, message):
    with pytest.raises(SpecError, match=f"trainable.*{message}"):
        step_of(decoder, trainable=patterns)
