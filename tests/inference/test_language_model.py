"""LocalModel against the plain forward pass, its independence of what is asked together, and what it refuses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.data.tokenizers import ByteTokenizer
from lcx.inference import language_model
from lcx.inference.generate import Generated
from lcx.inference.language_model import LocalModel
from lcx.inference.requests import Embed, Gen, Score, Unsupported, WindowOverflow
from lcx.inference.sampling import Sampling
from lcx.spec import edit


@pytest.fixture(scope="module")
def local(model):
    return LocalModel(model, ByteTokenizer(), window=64, row_tokens=64)


def test_logprobs_equal_the_forward_pass(logits, local):
    rows = [list(range(3, 3 + n)) for n in (2, 7, 40, 17, 64)]
    starts = [1, 3, 39, 17, 1]
    for row, start, got in zip(rows, starts, local.logprobs(rows, starts), strict=True):
        whole = logits(row)
        places = np.arange(start - 1, len(row) - 1)
        expected = jax.nn.log_softmax(whole)[places, np.asarray(row[start:], int)]
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)
        assert got.greedy.tolist() == (jnp.argmax(whole[places], axis=-1) == jnp.asarray(row[start:], int)).tolist()


def test_requests_come_back_in_order(local):
    requests = [
        Score("abc", ("de", "f", "")),
        Gen("hello", 4),
        Embed(("one text", "two")),
        Gen("x", 4, stop=("\x00never",)),
        Gen("hello", 4, sampling=Sampling(temperature=1.0), seed=7),
        Embed(()),
        Embed(("3",)),
    ]
    together, alone = local.run(requests), [local.run([request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        if hasattr(one, "ids"):
            assert (one.text, one.ids, one.finish) == (other.text, other.ids, other.finish)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        if hasattr(one, "vectors"):
            np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-6)
            np.testing.assert_allclose(np.linalg.norm(one.vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(together[0].sums, alone[0].sums, atol=1e-5)
    assert together[1].n_prompt == 5 and together[0].n_prompt == 3
    assert [len(x) for x in together[0].token_logprobs] == [2, 1, 0] and together[0].sums[2] == 0
    assert [len(together[n].vectors) for n in (2, 5, 6)] == [2, 0, 1]
    assert local.run([]) == []


def test_scores_are_those_of_the_joined_text(local, logits):
    out = local.run([Score("abc", ("de",))])[0]
    whole = jax.nn.log_softmax(logits(list(b"abcde")))
    np.testing.assert_allclose(out.token_logprobs[0], [whole[2, ord("d")], whole[3, ord("e")]], atol=1e-4)
    assert out.greedy[0] == [int(jnp.argmax(whole[n])) == b"abcde"[n + 1] for n in (2, 3)]


def test_embeddings_are_means_over_the_text_alone(local, model):
    ids = np.asarray([list(b"some text")], np.int32)
    mean = np.asarray(model(Batch(tokens=ids, info=causal_info(np.ones_like(ids))))[0])[0].mean(axis=0)
    np.testing.assert_allclose(local.run([Embed(("some text",))])[0].vectors[0], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize(
    ("stop", "text", "ids"),
    [
        (("abc", "b"), "xa", "xab"),  # b is complete first, though abc begins earlier
        (("cd", "bcd"), "xa", "xabcd"),
        (("d",), "xabc", "xabcd"),
        (("xa",), "", "xa"),
        (("é",), "xabcd", "xabcdé"),
        (("q",), "xabcdé", "xabcdé"),
    ],
)
def test_text_ends_before_the_stop_string_that_is_complete_first(local, monkeypatch, stop, text, ids):
    made = [*"xabcdé".encode()]
    fake = lambda model, prompts, **options: [Generated(made, [0.0] * len(made), "length") for _ in prompts]
    monkeypatch.setattr(language_model, "generate", fake)
    out = local.run([Gen("p", 9, stop=stop)])[0]
    assert (out.text, out.ids) == (text, [*ids.encode()]) and len(out.logprobs) == len(out.ids)
    assert out.finish == ("length" if stop == ("q",) else "stop")


def test_stop_strings_end_the_work_early(local, monkeypatch):
    asked = []
    fake = lambda model, prompts, until, **options: asked.extend(until) or [Generated([1], [0.0], "length") for _ in prompts]
    monkeypatch.setattr(language_model, "generate", fake)
    local.run([Gen("p", 9, stop=("ab",)), Gen("p", 9)])
    assert asked[0]([*b"xab"]) and not asked[0]([*b"xa"]) and asked[1] is None


class Attend(NamedTuple):
    prompt: str


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (Gen("a" * 60, 5), WindowOverflow, r"prompt of 60 tokens \+ 5 new ones: expected at most window = 64"),
        (Score("a" * 60, ("b", "b" * 5)), WindowOverflow, r"60 tokens \+ 5"),
        (Embed(("a", "a" * 65)), WindowOverflow, "65 tokens"),
        (Gen("", 5), ValueError, "empty prompt"),
        (Score("", ("b",)), ValueError, "empty prompt"),
        (Embed(("",)), ValueError, "empty prompt"),
        (Gen("a", 0), ValueError, "max_new of at least 1"),
        (Gen("a", 5, stop=("",)), ValueError, "no empty stop string"),
        (Gen("a", 5, seed=-1), ValueError, "seed = -1"),
        (Attend("a"), Unsupported, "a request of type Attend: expected one of Embed, Gen, Score"),
    ],
)
def test_nothing_runs_if_one_request_cannot_be_served(local, monkeypatch, bad, error, message):
    for name in ("generate", "token_logprobs", "embeddings"):
        monkeypatch.setattr(language_model, name, lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises(error, match=message):
        local.run([Gen("fine", 3), Score("fine", ("too",)), Embed(("fine",)), bad])


def test_rows_that_cannot_be_scored_are_refused(local):
    with pytest.raises(WindowOverflow) as raised:
        local.logprobs([[1] * 65], [1])
    assert (raised.value.n_prompt, raised.value.max_new, raised.value.window) == (65, 0, 64)
    for start in (0, 3):
        with pytest.raises(ValueError, match=f"start = {start}"):
            local.logprobs([[1, 2]], [start])
    with pytest.raises(ValueError, match="token id 999"):
        local.logprobs([[1, 999]], [1])


def test_the_model_must_hold_the_tokenizers_ids(model):
    small = edit(model.spec, "vocab", 258).build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="vocab = 258: expected at least the 259 ids"):
        LocalModel(small, ByteTokenizer(), window=8)
