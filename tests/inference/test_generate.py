"""Generation against the plain forward pass, and its independence of chunks, batches and interruptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.inference.generate import ASK_EVERY, answer, generate
from lcx.inference.reading import Consumed, feed, prefill
from lcx.inference.sampling import Sampling
from lcx.inference.saved import save
from lcx.inference.shapes import bucket
from lcx.models.decoder import rebuild
from lcx.spec import SpecError, edit

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(40, 70)), [9, 9, 9]]


def naive(logits, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(jnp.argmax(logits(ids)[-1])))
    return ids[len(prompt) :]


def test_greedy_equals_the_forward_pass(model, logits):
    rows = generate(model, PROMPTS, max_new=6, chunk=8)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.ids == naive(logits, prompt, 6) and row.finish == "length"
        whole = jax.nn.log_softmax(logits(prompt + row.ids))
        expected = [whole[len(prompt) - 1 + n, token] for n, token in enumerate(row.ids)]
        np.testing.assert_allclose(row.logprobs, expected, atol=1e-4)


def test_stop_token_ends_a_row_alone(model):
    free = generate(model, PROMPTS, max_new=6)
    stop = free[1].ids[2]
    rows = generate(model, PROMPTS, max_new=6, stop=[stop])
    for one, other in zip(free, rows, strict=True):
        cut = one.ids.index(stop) if stop in one.ids else 6
        assert other.ids == one.ids[:cut]
        assert other.finish == ("stop" if stop in one.ids else "length")


def test_a_condition_ends_a_row_alone_and_interruptions_change_nothing(model):
    length = 2 * ASK_EVERY + 6
    free = generate(model, PROMPTS, max_new=length)
    assert [len(row.ids) for row in free] == [length] * 4
    until = [None, lambda ids: ids[:3] == free[1].ids[:3], None, lambda ids: len(ids) > ASK_EVERY]
    rows = generate(model, PROMPTS, max_new=length, until=until)
    lengths = [length, ASK_EVERY, length, 2 * ASK_EVERY]
    assert [row.finish for row in rows] == ["length", "stop", "length", "stop"]
    assert [row.ids for row in rows] == [row.ids[:n] for row, n in zip(free, lengths, strict=True)]
    first = generate(model, PROMPTS, max_new=length, until=[lambda ids: True] * 4)
    assert [len(row.ids) for row in first] == [ASK_EVERY] * 4


def test_samples_do_not_depend_on_the_batch(model):
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9)
    together = generate(model, PROMPTS, max_new=5, sampling=sampling, seeds=[3, 4, 5, 6])
    alone = generate(model, PROMPTS[2:3], max_new=5, sampling=sampling, seeds=[5])
    assert together[2].ids == alone[0].ids
    again = generate(model, PROMPTS[2:3], max_new=5, sampling=sampling, seeds=[6])
    assert again[0].ids != alone[0].ids


def test_bfloat16(model):
    """The loop's state keeps its types, and log-probabilities stay near those in float32 of the same tokens."""
    rows = generate(rebuild(model, edit(model.spec, "compute", "bfloat16")), PROMPTS, max_new=6, chunk=8)
    full = generate(model, PROMPTS, max_new=6, chunk=8)
    np.testing.assert_allclose([row.logprobs[0] for row in rows], [row.logprobs[0] for row in full], atol=0.1)


@pytest.mark.parametrize("parts", [(slice(0, 5),), (slice(0, 3), slice(3, 5))])
def test_padding_in_a_chunk_is_not_read(model, parts):
    """The same tokens with padding behind, before and between them, and a row that reads nothing."""
    ids = np.asarray([[7, 8, 9, 0, 0], [0, 0, 7, 8, 9], [7, 8, 0, 9, 0], [7, 8, 9, 1, 2]], np.int32)
    segments = np.asarray([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], np.int32)
    read = Consumed(
        room=8,
        last=jnp.ones((4, 32)),
        state=model.init_state(4, 8),
        seen=jnp.zeros(4, jnp.int32),
        most=jnp.full(4, 8, jnp.int32),
        following=jnp.zeros(4),
        since=jnp.zeros(4, jnp.int32),
    )
    read = jax.tree.map(jnp.copy, read)
    for part in parts:
        read = feed(model, jnp.asarray(ids[:, part]), jnp.asarray(segments[:, part]), read)
    assert read.seen.tolist() == [3, 3, 3, 0]
    np.testing.assert_allclose(read.last[1:3], jnp.stack([read.last[0]] * 2), atol=1e-5)
    assert (read.last[3] == 1).all()


def test_sampling_by_hand():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.vmap(jax.random.key)(jnp.arange(2000))
    rows = jnp.broadcast_to(logits, (2000, 4))
    share = lambda sampling: np.bincount(sampling.choose(rows, keys), minlength=4) / 2000
    np.testing.assert_allclose(share(Sampling(temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.05)
    np.testing.assert_allclose(share(Sampling(temperature=1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.05)
    np.testing.assert_allclose(share(Sampling(temperature=1.0, top_p=0.75)), [0.625, 0.375, 0, 0], atol=0.05)
    np.testing.assert_allclose(share(Sampling(temperature=1.0, top_k=3, top_p=0.5)), [1, 0, 0, 0], atol=0.05)
    np.testing.assert_allclose(share(Sampling(temperature=0.5)), [0.685, 0.247, 0.062, 0.007], atol=0.05)
    with pytest.raises(SpecError, match=r"temperature = 0\.0: expected positive where top_k"):
        Sampling(top_k=3)


def test_ties_go_to_the_lowest_ids():
    keys = jax.vmap(jax.random.key)(jnp.arange(200))
    rows = jnp.broadcast_to(jnp.asarray([[1.0, 3.0, 3.0, 3.0]]), (200, 4))
    chosen = lambda sampling: sorted(set(sampling.choose(rows, keys).tolist()))
    assert chosen(Sampling()) == [1]
    assert chosen(Sampling(temperature=1.0, top_k=2)) == [1, 2]
    assert chosen(Sampling(temperature=1.0, top_p=0.5)) == [1, 2]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "0 prompts"),
        ([[1], []], {}, "at least one token of each"),
        ([[1]], {"max_new": 0}, "max_new = 0"),
        ([[1, 260]], {}, "token id 260: expected an id of the model's vocabulary, 0 to 259"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"seeds": [-1]}, r"seed = -1: expected 0 to 2\^32 - 1"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds, 1 conditions and 1 samplings for 1 prompts"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **({"max_new": 3} | options))


def test_rows_that_were_answered_are_not_answered_again(model, tmp_path):
    read = prefill(model, PROMPTS[:2], 2, 8, 16)
    answer(model, read, max_new=4)
    for again in (lambda: answer(model, read, max_new=4), lambda: save(tmp_path / "read", model, read)):
        with pytest.raises(ValueError, match="answered, or fed, before, which consumed them: expected the rows that came back"):
            again()


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 64, 65, 97, 1000)] == [16, 16, 24, 24, 32, 48, 64, 96, 128, 1024]
