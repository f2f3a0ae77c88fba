"""A decoder that trains itself gives what the authors' gives: losses of tokens and of chunks, and gradients of everything."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Window
from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.memory.ttt_e2e import TTTE2E
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.models.residual import Sandwich
from lcx.norms import RMSNorm
from lcx.positions.rope import Rope

HEADS, DEPTH, SUFFIX, CHUNK = 2, 3, 2, 4
RATES = {"plain": 1.0, "still": 0.0, "warm": 0.1 + (1.0 - 0.1) / 4}  # the rate of the first of 4 outer steps from 0.1 to 1
NORMS = ("seq_norm", "seq_post_norm", "ffn_norm", "ffn_post_norm")
LAYER = Layer(
    mixer=Attention(heads=HEADS, kv_heads=HEADS, head_dim=4, mask=Window(size=6), qk_norm=RMSNorm()),
    channel=GLU(hidden=12),
    residual=Sandwich(),
)
SPEC = Decoder(vocab=16, width=8, pattern=(LAYER,), periods=DEPTH, rope=Rope(pairing="interleaved"))


@pytest.fixture(scope="module")
def given():
    with np.load(Path(__file__).parent / "golden" / "ttt_e2e.npz") as found:
        return {key: found[key] for key in found}


def parameters(held: dict[str, np.ndarray]) -> dict:
    """The authors' arrays, `kind/name`, as the decoder's: heads apart."""
    of = lambda name: held[f"model/{name}/weight"]
    block, prime = lambda name: of(f"h/blocks/{name}"), lambda name: of(f"h/prime_storage/{name}")
    mlp = lambda get, name: {ours: get(f"{name}/{theirs}") for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))}
    norms = lambda get, names: {i: {"weight": get(name)} for i, name in enumerate(names)}
    split = lambda name: block(f"seq_modeling_block/{name}").reshape(DEPTH, 8, HEADS, 4)
    mixer = {"query": split("wq"), "key": split("wk"), "value": split("wv")}
    mixer["output"] = block("seq_modeling_block/wo").reshape(DEPTH, HEADS, 4, 8)
    mixer |= {f"{name}_norm": {"weight": block(f"seq_modeling_block/{name[0]}_norm")} for name in ("query", "key")}
    return {
        "embedding": of("wte"),
        "final_norm": {"weight": of("ln_f")},
        "slots": {0: {"mixer": mixer, "channel": mlp(block, "feed_forward"), "norms": norms(block, NORMS)}},
        "memory": {0: mlp(prime, "feed_forward_prime") | {"norms": norms(prime, ("ffn_prime_norm", "ffn_prime_post_norm"))}},
    }


def of_kind(given: dict[str, np.ndarray], kind: str) -> dict:
    return parameters({key.removeprefix(f"{kind}/"): value for key, value in given.items() if key.startswith(f"{kind}/")})


def built(given, rate):
    memory = TTTE2E(chunk=CHUNK, suffix=SUFFIX, hidden=12, rate=rate)
    graph, state = nnx.split(Decoder(**{**vars(SPEC), "memory": memory}).build(rngs=nnx.Rngs(0)))
    made = of_kind(given, "weights")
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, made))
    return nnx.merge(graph, state)


def losses(model, tokens, targets):
    """Of the targets; the authors' outer loss is their mean."""
    batch = Batch(tokens=tokens[None], info=causal_info(jnp.ones_like(tokens[None])))
    found = jax.nn.log_softmax(model.logits(model(batch)[0][0]))
    each = -jnp.take_along_axis(found, targets[:, None], axis=1)[:, 0]
    return each.mean(), each


def close(found, wanted, tolerance=5e-6):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def compare(given, case, mean, each):
    close(each, given[f"{case}/token_loss"])
    close(each.reshape(-1, CHUNK).mean(axis=1), given[f"{case}/chunk_loss"])
    close(mean, given[f"{case}/loss"][0])


@pytest.mark.parametrize("case", ["still", "warm"])
def test_losses(given, case):
    compare(given, case, *jax.jit(losses)(built(given, RATES[case]), given["tokens"], given["targets"]))


def test_gradients(given):
    both = jax.jit(jax.value_and_grad(losses, has_aux=True))
    found, slope = both(built(given, RATES["plain"]), given["tokens"], given["targets"])
    compare(given, "plain", *found)
    wanted = of_kind(given, "grad")
    jax.tree.map(lambda a, b: close(a, b, 4e-5), nnx.to_pure_dict(nnx.state(slope)), wanted)
