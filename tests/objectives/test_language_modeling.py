"""Language modelling against a dense float64 cross-entropy: value, gradient, odd lengths, weights, chunks, memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from lcx.batch import Batch, causal_info
from lcx.objectives.bench import head_memory
from lcx.objectives.language_modeling import LanguageModeling
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules

B, T, M, V = 2, 13, 5, 12


class _Spec:
    rules, compute = Rules(), "float32"


class Head(nnx.Module):
    """A model whose hidden states are its parameters, so that gradients of the head alone are seen."""

    def __init__(self, hidden, matrix, aux=None):
        self.spec, self.aux = _Spec(), nnx.data(aux or {})
        self.hidden, self.matrix = nnx.Param(jnp.asarray(hidden)), nnx.Param(jnp.asarray(matrix), axes=(None, "vocab"))

    def __call__(self, batch, state=None, *, upto=None):
        return self.hidden[...], state, self.aux

    def logits(self, hidden):
        return hidden @ self.matrix[...]


def arrays(seed=0, length=T):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, length, M)).astype(np.float32)
    matrix = rng.normal(size=(M, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, length)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], (B, length)).astype(np.float32)
    return hidden, matrix, targets, weights


def batch_of(targets, weights):
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    info = causal_info(jnp.ones_like(targets))
    return Batch(tokens=jnp.zeros_like(targets), info=info, targets=targets, loss_weights=weights)


def dense(hidden, matrix, targets, weights, z_loss):
    """(cross-entropy sum, total, d total / d hidden, d total / d matrix, correct) in float64 NumPy."""
    hidden, matrix, weights = (np.asarray(x, np.float64) for x in (hidden, matrix, weights))
    logits = hidden @ matrix
    lse = np.log(np.exp(logits).sum(-1))
    one_hot = np.eye(V)[np.clip(targets, 0, V - 1)]
    entropy = (weights * (lse - (logits * one_hot).sum(-1))).sum()
    soft = np.exp(logits - lse[..., None])
    slope = weights[..., None] * (soft - one_hot + 2 * z_loss * lse[..., None] * soft)
    total = entropy + z_loss * (weights * lse**2).sum()
    correct = (weights * (logits.argmax(-1) == targets)).sum()
    return entropy, total, slope @ matrix.T, np.einsum("btm,btv->mv", hidden, slope), correct


def run(objective, hidden, matrix, targets, weights, aux=None):
    def total(hidden, matrix):
        value, weight, sums = objective.loss(Head(hidden, matrix, aux), batch_of(targets, weights), jax.random.key(0))
        return value, (weight, sums)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, matrix)


@pytest.mark.parametrize(("chunk", "parts"), [(1, 1), (4, 1), (13, 3), (1024, 1)])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_dense_float64_in_value_and_gradient(chunk, parts, z_loss):
    hidden, matrix, targets, weights = arrays()
    objective = LanguageModeling(chunk=chunk, parts=parts, z_loss=z_loss)
    (total, (weight, sums)), (by_hidden, by_matrix) = run(objective, hidden, matrix, targets, weights)
    entropy, wanted, d_hidden, d_matrix, correct = dense(hidden, matrix, targets, weights, z_loss)
    np.testing.assert_allclose(sums["loss_sum"], entropy, rtol=1e-6)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    np.testing.assert_allclose(by_hidden, d_hidden, atol=2e-6)
    np.testing.assert_allclose(by_matrix, d_matrix, atol=5e-6)
    assert float(weight) == float(sums["weight"]) == weights.sum()
    assert float(sums["correct"]) == correct


def test_targets_without_weight_are_never_read():
    hidden, matrix, targets, weights = arrays()
    nowhere = np.where(weights == 0, -1, targets)
    (total, _), _ = run(LanguageModeling(chunk=4), hidden, matrix, nowhere, weights)
    np.testing.assert_allclose(total, dense(hidden, matrix, targets, weights, 0)[1], rtol=1e-6)


@pytest.mark.parametrize(("target", "parts"), [(-1, 1), (V, 1), (-1, 3), (V, 3)])
def test_weighted_target_outside_the_vocabulary_is_not_a_number(target, parts):
    hidden, matrix, targets, weights = arrays()
    targets[1, 3], weights[1, 3] = target, 1
    (total, _), _ = run(LanguageModeling(chunk=4, parts=parts), hidden, matrix, targets, weights)
    assert np.isnan(total)


def test_the_first_of_equal_logits_is_the_top_in_any_parts():
    hidden, matrix, targets, weights = arrays()
    matrix = np.repeat(matrix[:, :3], 4, axis=1)[:, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]  # columns 0 to 2, four times
    count = lambda parts: run(LanguageModeling(parts=parts), hidden, matrix, targets % 3, weights)[0][1][1]["correct"]
    assert count(1) == count(4) > 0


def test_a_vocabulary_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 12 does not divide into 5 parts of each of 1 shares"):
        run(LanguageModeling(parts=5), *arrays())


def test_auxiliary_losses_enter_once_a_token_and_metrics_are_averages():
    hidden, matrix, targets, weights = arrays()
    objective = LanguageModeling(chunk=4)
    aux = {"balance_loss": jnp.float32(0.25), "router_loss": jnp.float32(0.5), "load": jnp.float32(3.0)}
    (total, (weight, sums)), _ = run(objective, hidden, matrix, targets, weights, aux)
    np.testing.assert_allclose(total, sums["loss_sum"] + weight * 0.75, rtol=1e-6)
    figures = objective.report({name: float(value) for name, value in sums.items()})
    np.testing.assert_allclose([figures["balance_loss"], figures["load"]], [0.25, 3.0], rtol=1e-6)


def test_sums_of_parts_divide_to_the_token_mean_and_means_of_parts_do_not():
    """10 tokens of cross-entropy 3 and 1000 of 1: the mean of means is 2, the token mean 1030 / 1010 = 1.0198."""
    objective = LanguageModeling(chunk=64)

    def part(tokens, entropy):
        other = np.log((np.exp(entropy) - 1) / (V - 1))  # logits (0, other, other, ...) give this cross-entropy for target 0
        matrix = np.zeros((M, V), np.float32)
        matrix[0, 1:] = other
        hidden = np.zeros((1, tokens, M), np.float32)
        hidden[..., 0] = 1
        targets, weights = np.zeros((1, tokens), np.int32), np.ones((1, tokens), np.float32)
        total, weight, _ = objective.loss(Head(hidden, matrix), batch_of(targets, weights), jax.random.key(0))
        return float(total), float(weight)

    parts = part(10, 3.0), part(1000, 1.0)
    assert np.mean([total / weight for total, weight in parts]) == pytest.approx(2.0, rel=1e-6)
    assert sum(t for t, _ in parts) / sum(w for _, w in parts) == pytest.approx(1030 / 1010, rel=1e-6)


def test_example_mean_is_a_matter_of_weights():
    """Lengths 20 and 2000 with mean cross-entropy 2 and 1: token mean 1.0099, example mean 1.5 (weights 1 / tokens)."""
    objective = LanguageModeling(chunk=128)
    length = 2020
    entropy = np.where(np.arange(length) < 20, 2.0, 1.0)
    hidden = np.zeros((1, length, M), np.float32)
    hidden[0, :, 0] = np.log((np.exp(entropy) - 1) / (V - 1))
    matrix = np.zeros((M, V), np.float32)
    matrix[0, 1:] = 1
    targets = np.zeros((1, length), np.int32)

    def mean(weights):
        batch = batch_of(targets, weights[None].astype(np.float32))
        total, weight, _ = objective.loss(Head(hidden, matrix), batch, jax.random.key(0))
        return float(total / weight)

    assert mean(np.ones(length)) == pytest.approx(2040 / 2020, rel=1e-5)
    assert mean(np.where(np.arange(length) < 20, 1 / 20, 1 / 2000)) == pytest.approx(1.5, rel=1e-5)


def test_prompts_are_refused():
    hidden, matrix, targets, _ = arrays()
    batch = Batch(tokens=jnp.zeros_like(targets), info=causal_info(jnp.ones_like(targets)))
    with pytest.raises(ValueError, match="targets and loss_weights"):
        LanguageModeling().loss(Head(hidden, matrix), batch, jax.random.key(0))


@pytest.mark.parametrize(
    ("axes", "parts"),
    [
        ({"data": 2, "context": 2}, 1),
        ({"fsdp": 2, "tensor": 2}, 4),
        pytest.param({"fsdp": 2, "tensor": 2}, 1, marks=pytest.mark.slow),
    ],
)
def test_devices_exchange_the_head_and_its_gradient_outside_the_loop_over_chunks(axes, parts):
    """On a mesh the value and gradient are those of one device, and no loop body talks about an array of the vocabulary."""
    hidden, matrix, targets, weights = arrays(length=24)
    vocab = 2 * V
    matrix = np.concatenate([matrix, matrix - 1], axis=1)

    def total(hidden, matrix):
        objective = LanguageModeling(chunk=4, parts=parts)
        return objective.loss(Head(hidden, matrix), batch_of(targets, weights), jax.random.key(0))[0]

    run = jax.value_and_grad(total, argnums=(0, 1))
    wanted = run(hidden, matrix)
    mesh = MeshSpec(**axes).build()
    with jax.set_mesh(mesh):
        place = lambda x, *logical: jax.device_put(x, NamedSharding(mesh, Rules().partition(logical)))
        inputs = place(hidden, "batch", "sequence", None), place(matrix, None, "vocab")
        compiled = jax.jit(run).lower(*inputs).compile()
    for got, want in zip(jax.tree.leaves(compiled(*inputs)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    computations = re.split(r"\n(?=\S)", compiled.as_text())
    loops = [text for text in computations if not text.startswith("ENTRY")]
    exchanges = re.compile(rf"\[[\d,]*\b({vocab}|{vocab // 2})\b[\d,]*\]\S* (all|reduce-scatter|collective)\S*\(")
    assert any("while" in text for text in computations)
    assert not any(exchanges.search(text) for text in loops)
    if "data" in axes:
        assert any(exchanges.search(text) for text in computations)


def test_memory_at_32k_tokens_and_128k_words_is_one_chunk_of_logits():
    """Compiled, width 2048: 32 GiB naive (logits and their gradient); chunked, the head's gradient and a few chunks."""
    found = head_memory()
    assert found.naive >= 2 * found.logits == 32 * 2**30
    head, chunk = 4 * 2048 * found.vocab, 4 * found.chunk * found.vocab
    assert found.chunked < head + 4 * chunk < found.naive / 10
