"""Generation and scoring against the plain forward pass, and their independence of batching and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.data.tokenizers import ByteTokenizer
from lcx.inference.generate import generate
from lcx.inference.language_model import Embed, Gen, LocalModel, Score, WindowOverflow
from lcx.inference.sampling import Sampling
from lcx.inference.shapes import bucket
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.spec import SpecError

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(40, 70)), [9, 9, 9]]


@pytest.fixture(scope="module")
def model():
    mixer = Attention(heads=2, kv_heads=1, head_dim=8)
    layer = Layer(mixer=mixer, channel=GLU(hidden=32))
    spec = Decoder(vocab=260, width=32, pattern=(layer,), periods=2, embed_mixer=ShortConvolution(), embed_scale=8.0)
    return spec.build(rngs=nnx.Rngs(0))


@jax.jit
def padded_logits(model, ids, segments):
    hidden, _, _ = model(Batch(tokens=ids, info=causal_info(segments)))
    return model.logits(hidden)


def logits(model, ids):
    """Of one row, padded to one length so that it compiles once."""
    pad = lambda row: jnp.pad(jnp.asarray(row), ((0, 0), (0, 64 - len(ids[0]))))
    return padded_logits(model, pad(ids), pad(np.ones_like(ids)))[:, : len(ids[0])]


def naive(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(jnp.argmax(logits(model, [ids])[0, -1])))
    return ids[len(prompt) :]


def test_greedy_equals_the_forward_pass(model):
    rows = generate(model, PROMPTS, max_new=6, chunk=8)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.ids == naive(model, prompt, 6) and row.finish == "length"
        whole = jax.nn.log_softmax(logits(model, [prompt + row.ids])[0])
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


def test_samples_do_not_depend_on_the_batch(model):
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9)
    together = generate(model, PROMPTS, max_new=5, sampling=sampling, seeds=[3, 4, 5, 6])
    alone = generate(model, PROMPTS[2:3], max_new=5, sampling=sampling, seeds=[5])
    assert together[2].ids == alone[0].ids
    again = generate(model, PROMPTS[2:3], max_new=5, sampling=sampling, seeds=[6])
    assert again[0].ids != alone[0].ids


def test_sampling_by_hand():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.vmap(jax.random.key)(jnp.arange(2000))
    rows = jnp.broadcast_to(logits, (2000, 4))
    share = lambda sampling: np.bincount(sampling.choose(rows, keys), minlength=4) / 2000
    np.testing.assert_allclose(share(Sampling(temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.05)
    np.testing.assert_allclose(share(Sampling(temperature=1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.05)
    np.testing.assert_allclose(share(Sampling(temperature=1.0, top_p=0.8)), [0.625, 0.375, 0, 0], atol=0.05)
    np.testing.assert_allclose(share(Sampling(temperature=0.5)), [0.685, 0.247, 0.062, 0.007], atol=0.05)
    assert Sampling().choose(jnp.asarray([[1.0, 3.0, 3.0]]), keys[:1]).tolist() == [1]
    with pytest.raises(SpecError, match=r"temperature = 0\.0: expected positive where top_k"):
        Sampling(top_k=3)


@pytest.fixture(scope="module")
def local(model):
    return LocalModel(model, ByteTokenizer(), window=64, row_tokens=64)


def test_logprobs_equal_the_forward_pass(model, local):
    rows = [list(range(3, 3 + n)) for n in (2, 7, 40, 17, 64)]
    starts = [1, 3, 39, 17, 1]
    for row, start, got in zip(rows, starts, local.logprobs(rows, starts), strict=True):
        whole = logits(model, [row])[0]
        places = np.arange(start - 1, len(row) - 1)
        expected = jax.nn.log_softmax(whole)[places, np.asarray(row[start:], int)]
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)
        assert got.greedy.tolist() == (jnp.argmax(whole[places], axis=-1) == jnp.asarray(row[start:], int)).tolist()


def test_requests_come_back_in_order(local):
    requests = [
        Score("abc", ("de", "f")),
        Gen("hello", 4),
        Embed(("one text", "two")),
        Gen("x", 4, stop=("\x00never",)),
        Gen("hello", 3, sampling=Sampling(temperature=1.0), seed=7),
    ]
    together, alone = local.run(requests), [local.run([request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        if hasattr(one, "ids"):
            assert (one.text, one.ids, one.finish) == (other.text, other.ids, other.finish)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    np.testing.assert_allclose(together[0].sums, alone[0].sums, atol=1e-5)
    np.testing.assert_allclose(together[2].vectors, alone[2].vectors, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together[2].vectors, axis=1), 1, atol=1e-6)
    assert together[1].n_prompt == 5 and together[0].n_prompt == 3
    assert [len(x) for x in together[0].token_logprobs] == [2, 1]


def test_stop_strings_cut_the_text(local):
    free = local.run([Gen("hello", 8)])[0]
    stop = free.text[2:4]
    cut = local.run([Gen("hello", 8, stop=(stop, "\x00never"))])[0]
    assert cut.text == free.text[: free.text.find(stop)] and cut.finish == "stop"
    assert local.decode(cut.ids).endswith(stop)


def test_nothing_is_truncated(local):
    with pytest.raises(WindowOverflow, match="prompt of 60 tokens \\+ 5 new ones: expected at most window = 64"):
        local.run([Gen("a" * 60, 5)])
    with pytest.raises(WindowOverflow):
        local.logprobs([[1] * 65], [1])
    with pytest.raises(ValueError, match="start = 0"):
        local.logprobs([[1, 2]], [0])
    with pytest.raises(ValueError, match="empty prompt"):
        local.run([Gen("", 5)])


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 64, 65, 97, 1000)] == [16, 16, 24, 24, 32, 48, 64, 96, 128, 1024]
