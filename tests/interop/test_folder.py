"""Folders that are not whole, or of a model that is not known, are refused in a line that names the tensor, file or key."""

import json
import shutil

import jax
import numpy as np
import pytest
from golden import GOLDEN, loaded
from safetensors.numpy import load_file, save_file

from lcx.interop import hf
from lcx.interop.folder import Folder, is_folder
from lcx.parallel.mesh import MeshSpec
from lcx.spec import SpecError, edits


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "qwen2", tmp_path / "qwen2")
    return tmp_path / "qwen2"


def edit_tensors(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refused(folder):
    with pytest.raises(SpecError) as found:
        loaded(folder, MeshSpec().build(jax.devices()[:1]))
    return str(found.value)


Q, HEAD = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"

TENSORS = [
    (lambda held: held.pop(Q), f"tensor {Q} of shape (16, 16) is missing"),
    (lambda held: held.update({Q: held[Q][:8]}), f"tensor {Q} of shape (8, 16): expected (16, 16)"),
    (lambda held: held.update({Q: held[Q].astype(np.int8)}), f"tensor {Q} of dtype I8: expected one of F32"),
    (lambda held: held.update(extra=held[Q]), "tensor extra: nothing of the model that config.json says"),
]


@pytest.mark.parametrize(("change", "line"), TENSORS)
def test_a_tensor_that_is_wrong_is_named(folder, change, line):
    edit_tensors(folder, change)
    assert line in refused(folder)


CONFIGS = [
    ({"model_type": "mamba"}, "model_type = 'mamba', architectures = ['Qwen2ForCausalLM']: expected one of llama"),
    ({"hidden_size": ...}, "hidden_size is missing"),
    ({"hidden_act": "relu2"}, "hidden_act = 'relu2': expected one of silu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: expected none"),
    ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "rope_type = 'su': expected one of default"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope entry low_freq_factor is missing"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope entry beta_fast = 3 beside"),
    ({"layer_types": ["full_attention"]}, "layer_types[1] = missing"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: expected none for qwen2"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters and rope_scaling differ"),
    ({"hidden_act": None}, "hidden_act = None: expected one of silu"),
    ({"rope_parameters": {"rope_theta": None}}, "rope_theta = null"),
    ({"hidden_size": "16"}, "qwen2/config.json: hidden_size = '16': expected a positive integer"),
    ({"num_attention_heads": True}, "num_attention_heads = True: expected a positive integer"),
    ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a positive integer"),
    ({"max_position_embeddings": -1}, "max_position_embeddings = -1: expected a positive integer"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps = 'x': expected a positive number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: expected true or false"),
    ({"hidden_act": ["silu"]}, "hidden_act = ['silu']: expected a word"),
    ({"layer_types": "full_attention"}, "layer_types = 'full_attention': expected a list, one entry a layer"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3: expected a divisor of num_attention_heads = 4"),
    ({"rope_parameters": "x"}, "rope_parameters = 'x': expected an object"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope entry rope_type = ['yarn']: expected a word"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "a"}}, "rope entry factor = 'a': expected a positive number"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "config.json: LinearInterpolation.factor = 0.5"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope entry factor is missing beside rope_type = 'yarn'"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types[1] = 'chunked_attention'"),
]


@pytest.mark.parametrize(("entries", "line"), CONFIGS)
def test_a_config_that_is_not_known_is_named(folder, entries, line):
    edit_config(folder, **entries)
    assert line in refused(folder)


def test_a_truncated_file_is_named_with_its_first_tensor(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert "the file is truncated, tensor model." in refused(folder)
    file.write_bytes(whole[:100])
    assert "should be a header: the file is truncated" in refused(folder)
    file.write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    assert "no safetensors file" in refused(folder)
    file.unlink()
    assert "no tensors: expected model.safetensors" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin, which is pickled and not read" in refused(folder)


def test_a_header_that_does_not_add_up_is_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    start, stop = header[Q]["data_offsets"]
    for moved in ([start - 4, stop - 4], [start, stop - 4], [start + 4, stop]):
        told = json.dumps(header | {Q: header[Q] | {"data_offsets": moved}}).encode()
        file.write_bytes(len(told).to_bytes(8, "little") + told + whole[8 + length :])
        assert "expected its bytes right behind those before it" in refused(folder)


def test_two_sets_of_weights_are_refused(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: "model.safetensors"}}))
    assert "both model.safetensors and model.safetensors.index.json" in refused(folder)


def test_masks_that_are_no_parameters_are_left_out(tmp_path):
    """Older GPT-NeoX folders hold them, in other types."""
    folder = tmp_path / "neox"
    shutil.copytree(GOLDEN / "gpt-neox", folder)
    edit_tensors(folder, lambda held: held.update({"gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), bool)}))
    loaded(folder, MeshSpec().build(jax.devices()[:1]))


def test_an_index_and_its_files_agree(tmp_path):
    folder = tmp_path / "llama2"
    shutil.copytree(GOLDEN / "llama2", folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))
    write = lambda places: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    write(index["weight_map"] | {name: second})
    assert f"tensor {name}, which model.safetensors.index.json has in {second}" in refused(folder)
    write(index["weight_map"] | {"more": second})
    assert "no tensor more" in refused(folder)
    write({})
    assert "no weight_map" in refused(folder)
    write(index["weight_map"])
    (folder / second).unlink()
    assert "there is no such file" in refused(folder)


def test_a_head_beside_a_tied_table_is_that_table(tmp_path):
    """Some checkpoints hold both; another head is refused, not left out."""
    folder = tmp_path / "tied"
    shutil.copytree(GOLDEN / "llama-linear", folder)
    edit_tensors(folder, lambda held: held.update({HEAD: held["model.embed_tokens.weight"]}))
    loaded(folder, MeshSpec().build(jax.devices()[:1]))
    edit_tensors(folder, lambda held: held.update({HEAD: 2 * held[HEAD]}))
    assert "lm_head.weight: expected that of model.embed_tokens.weight, as tie_word_embeddings says" in refused(folder)


def test_a_folder_lies_on_a_mesh_as_it_does_on_one_device():
    """Heads and hidden channels over two axes, layers of a stack put one by one into their shares."""
    _, wanted = loaded(GOLDEN / "llama2", MeshSpec().build(jax.devices()[:1]))
    mesh = MeshSpec(fsdp=2, tensor=2).build()
    _, found = loaded(GOLDEN / "llama2", mesh)
    assert found.slots[0].mixer.query.sharding.shard_shape((2, 16, 4, 6)) == (2, 8, 2, 6)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, wanted)


def test_a_folder_under_another_model_names_the_parameter():
    spec, _ = hf.read_decoder(Folder(GOLDEN / "llama2"))
    with pytest.raises(SpecError, match=r"parameter head is \(16, 40\) in the folder, absent in the model"):
        loaded(GOLDEN / "llama2", MeshSpec().build(jax.devices()[:1]), edits(spec, [("head", "tied")]))


def test_a_model_that_no_family_has_is_not_written(tmp_path):
    spec, model = loaded(GOLDEN / "llama2", MeshSpec().build(jax.devices()[:1]))
    for changes, line in (
        ([("pattern[0].mixer.sinks", "learned")], "pattern[0].mixer.sinks"),
        ([("rope", None)], "rope = None"),
        ([("embed_scale", 2.0)], "embed_scale"),
    ):
        with pytest.raises(SpecError, match="no family of transformers is like it") as found:
            hf.write(model, edits(spec, changes), 24, tmp_path / "out", dtype="float32")
        assert line in str(found.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_a_folder(tmp_path):
    assert is_folder(GOLDEN / "llama2")
    assert not is_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"root": {}}')
    assert not is_folder(tmp_path)
