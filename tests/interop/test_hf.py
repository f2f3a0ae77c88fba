"""Checkpoint folders of `transformers` as decoders: logits, greedy tokens, and the same folder written back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import GOLDEN, NAMES, answers, loaded
from safetensors.numpy import load_file

from lcx.batch import Batch, causal_info
from lcx.inference.generate import generate
from lcx.interop import hf
from lcx.parallel.mesh import MeshSpec
from lcx.training.pretrained import pretrained

LOGITS = jax.jit(lambda model, tokens, info: model.logits(model(Batch(tokens=tokens, info=info))[0]))


@pytest.fixture(scope="module", params=NAMES)
def given(request):
    """(name, spec, model, answers) of a golden folder."""
    spec, model = loaded(GOLDEN / request.param, MeshSpec().build(jax.devices()[:1]))
    return request.param, spec, model, answers(request.param)


def test_logits_are_those_of_transformers(given):
    """Within and beyond the window; short rows with padding on either side; two documents in one row."""
    _, _, model, held = given
    tokens, short = held["tokens"], held["short"].shape[1]
    length = tokens.shape[1]
    whole = np.ones_like(tokens)
    close(LOGITS(model, jnp.asarray(tokens), causal_info(whole)), held["long"])
    padded, segments = np.zeros((3, length), np.int32), np.zeros((3, length), np.int32)
    for row, start in ((0, 0), (1, length - short)):
        padded[row, start : start + short], segments[row, start : start + short] = tokens[row, :short], 1
    padded[2, : 2 * short] = tokens[:, :short].reshape(-1)
    segments[2, : 2 * short] = np.repeat([1, 2], short)
    found = LOGITS(model, jnp.asarray(padded), causal_info(segments))
    close(found[0, :short], held["short"][0])
    close(found[1, length - short :], held["short"][1])
    close(found[2, : 2 * short].reshape(2, short, -1), held["short"])


def test_greedy_tokens_are_those_of_transformers(given):
    _, _, model, held = given
    prompts = [held["tokens"][0, : held[key].shape[1]].tolist() for key in ("short", "long")]
    made = generate(model, prompts, max_new=len(held["short_greedy"]), chunk=48)
    assert [row.ids for row in made] == [held["short_greedy"].tolist(), held["long_greedy"].tolist()]


def test_a_folder_is_written_back_as_it_was(given, tmp_path):
    """The same config and the same tensors, bit by bit."""
    name, spec, model, _ = given
    window = hf.read_decoder(hf.Folder(GOLDEN / name))[1]
    hf.write(model, spec, window, tmp_path / "back", like=GOLDEN / name, dtype="float32")
    before, after = hf.Folder(GOLDEN / name), hf.Folder(tmp_path / "back")
    assert before.config == after.config
    assert before.tensors.keys() == after.tensors.keys()
    for tensor in before.tensors:
        np.testing.assert_array_equal(before.read(tensor), after.read(tensor))


def test_a_tokenizer_alone_is_read_back_with_the_token_that_ends_answers(tmp_path):
    """As a run has it whose tokenizer was of no checkpoint folder."""
    spec, model = loaded(GOLDEN / "llama3.1", MeshSpec().build(jax.devices()[:1]))
    (tmp_path / "words").mkdir()
    shutil.copyfile(GOLDEN / "llama3.1" / "tokenizer.json", tmp_path / "words" / "tokenizer.json")
    for ends in ((3,), (5, 3)):
        made = tmp_path / f"made{len(ends)}"
        hf.write(model, spec, 192, made, like=tmp_path / "words", dtype="float32", ends=ends)
        assert pretrained(made).data.tokenizer.stops == ends


def test_a_config_of_its_own_says_the_same_model(given, tmp_path):
    """Written without the folder that it came from, the config is read as the same decoder."""
    name, spec, model, _ = given
    window = hf.read_decoder(hf.Folder(GOLDEN / name))[1]
    hf.write(model, spec, window, tmp_path / "own", dtype="bfloat16")
    again, length = hf.read_decoder(hf.Folder(tmp_path / "own"))
    assert hf.same_model(again, spec) is None
    assert length == window
    (file,) = (tmp_path / "own").glob("*.safetensors")
    assert all(array.dtype == jnp.bfloat16 for array in load_file(file).values())


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-4)
