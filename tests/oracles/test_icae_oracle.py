"""A Llama with ICAE's encoder gives its authors' memories, and logits from which a text is told back."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import test_families as families
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.lora import LoRA
from lcx.memory.icae import ICAE
from lcx.objectives.autoencoding import Autoencoding

GOLDEN = Path(__file__).parent / "golden"


def test_memories_and_reconstruction():
    with np.load(GOLDEN / "icae.npz") as file:
        held = dict(file)
    memory = ICAE(segment=5, slots=2, most=6, lora=LoRA(rank=2, scale=2.0))
    spec = dataclasses.replace(families.decoder("llama"), memory=memory)
    graph, state = nnx.split(spec.build(rngs=nnx.Rngs(0)))
    with np.load(GOLDEN / "llama.npz") as file:
        made = families.parameters("llama", dict(file), spec)
    embed = held["weights/embed"]
    made["memory"] = {"summary": embed[:2], "autoencoding": embed[2:3], "continuing": embed[3:4]}
    pairs = {}
    for name, letter, heads in (("query", "q", 4), ("value", "v", 2)):
        get = lambda kind, letter=letter: np.stack([held[f"weights/{letter}/{n}/{kind}"] for n in range(2)])
        up = np.moveaxis(get("up").reshape(2, heads, 6, 2), 3, 1)
        pairs[name] = {"down": np.moveaxis(get("down"), 2, 1), "up": up}
    made["encoder"] = {"slots": {0: pairs}}
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, made))
    model = nnx.merge(graph, state)
    tokens = jnp.asarray(held["ae/tokens"])
    info = causal_info(np.ones(tokens.shape, np.int32))

    @jax.jit
    def both(model):
        batch = Batch(tokens=tokens, info=info)
        bank = model(batch, model.init_state(1, 15))[1].bank
        behind, some = model.memory.behind(bank, None), lambda n: jnp.ones((1, n), bool)
        last = model._encoded(tokens[:, 10:], some(3), behind, some(2))
        return jnp.concatenate([bank[0][0, :4], last[0]]), model.logits(model.autoencoded(batch))

    memories, logits = both(model)
    np.testing.assert_allclose(memories, held["ae/memories"], rtol=0, atol=2e-5 * np.abs(held["ae/memories"]).max())
    wanted = held["ae/logits"][0, 6:19]  # behind the mark, up to the last token
    np.testing.assert_allclose(logits[0], wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    batch = Batch(tokens=tokens, info=info, targets=tokens, loss_weights=jnp.ones(tokens.shape))
    total, weight, _ = jax.jit(Autoencoding(share=1.0).loss)(model, batch, jax.random.key(0))
    every = jax.nn.log_softmax(held["ae/logits"][0, 6:20])
    ending = every[-1, 2]  # which ends the text is not asked of ours
    found = (float(total) - float(ending)) / 14
    assert weight == 13 and abs(found - held["ae/loss"]) < 2e-5 * held["ae/loss"]
