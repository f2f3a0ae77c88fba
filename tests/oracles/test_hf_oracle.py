"""transformers and peft load what is written: folders whose config.json is of this project's own, and adapters."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
from golden import GOLDEN, NAMES, answers, loaded

from lcx.batch import Batch, causal_info
from lcx.interop import hf, peft
from lcx.lora import LoRA
from lcx.models.decoder import merged
from lcx.parallel.mesh import MeshSpec
from lcx.spec import edit

pytestmark = pytest.mark.oracle


def logits_of(folder, tokens, adapter=None):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_a_config_of_our_own(name, tmp_path):
    spec, model = loaded(GOLDEN / name, MeshSpec().build(jax.devices()[:1]))
    window = hf.read_decoder(hf.Folder(GOLDEN / name))[1]
    hf.write(model, spec, window, tmp_path / "own", dtype="float32")
    held = answers(name)
    np.testing.assert_allclose(logits_of(tmp_path / "own", held["tokens"]), held["long"], atol=2e-4)


@pytest.mark.parametrize("name", ["llama2", "qwen3", "gemma2", "smollm3"])
def test_peft_reads_an_adapter(name, tmp_path):
    lora = LoRA(rank=3, projections=("query", "key", "value", "output", "gate", "up", "down"), scale=5.0)
    spec, plain = loaded(GOLDEN / name, MeshSpec().build(jax.devices()[:1]))
    model = edit(spec, "lora", lora).build(rngs=nnx.Rngs(0))
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    for path, leaf in nnx.to_flat_state(nnx.state(plain)):
        flat[path] = leaf
    for n, path in enumerate(path for path in flat if path[-1] == "up" and "lora" in path):
        flat[path] = flat[path].replace(jax.random.normal(jax.random.key(n), flat[path].shape) / 3)
    nnx.update(model, nnx.from_flat_state(flat))
    peft.write(model, GOLDEN / name, tmp_path / "adapter")
    tokens = answers(name)["tokens"]
    batch = Batch(tokens=jnp.asarray(tokens), info=causal_info(np.ones_like(tokens)))
    found = jax.jit(lambda model, batch: model.logits(model(batch)[0]))(merged(model), batch)
    wanted = logits_of(GOLDEN / name, tokens, tmp_path / "adapter")
    np.testing.assert_allclose(found, wanted, atol=5e-4)
    assert np.abs(wanted - answers(name)["long"]).max() > 0.1
