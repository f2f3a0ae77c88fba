"""The decoder with the weights of four `transformers` families gives their logits: norms, biases, rotation, caps, windows."""

from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Causal, Window
from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.models.residual import PreNorm, Sandwich
from lcx.norms import RMSNorm

GEMMA = {"norm": RMSNorm(offset=1.0), "residual": Sandwich()}
NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def layer(mask=None, activation="silu", norm=None, residual=None, **mixer) -> Layer:
    attention = Attention(heads=4, kv_heads=2, head_dim=6, mask=mask or Causal(), **mixer)
    channel = GLU(hidden=40, activation=activation)
    return Layer(mixer=attention, channel=channel, norm=norm or RMSNorm(), residual=residual or PreNorm())


def decoder(family: str) -> Decoder:
    sizes = {"vocab": 48, "width": 24, "periods": 2}
    if family == "llama":
        return Decoder(**sizes, pattern=(layer(),), head="untied")
    if family == "qwen2":
        return Decoder(**sizes, pattern=(layer(bias="qkv"),))
    if family == "qwen3":
        return Decoder(**sizes, pattern=(layer(qk_norm=RMSNorm()),))
    options = {"activation": "gelu_tanh", "softcap": 3.0, "scale": 1 / 3.0, **GEMMA}
    pattern = (layer(mask=Window(size=8), **options), layer(**options))
    gemma = {"final_norm": RMSNorm(offset=1.0), "embed_scale": 24**0.5, "logit_softcap": 4.0}
    return Decoder(**(sizes | {"periods": 1}), pattern=pattern, **gemma)


def parameters(family: str, held: dict, spec: Decoder) -> dict:
    """transformers' arrays as the decoder's: heads apart, matrices [in, out], layers stacked [periods, ...] a pattern slot."""
    depth, pattern = spec.depth, len(spec.pattern)
    get = lambda n, name: held[f"weights/model.layers.{n}.{name}"]
    split = lambda x, heads: x.reshape(heads, 6, *x.shape[1:])
    slots = {}
    for slot in range(pattern):
        of = [n for n in range(depth) if n % pattern == slot]
        stack = lambda make, of=of: np.stack([make(n) for n in of])
        names = (("query", "q", 4), ("key", "k", 2), ("value", "v", 2))
        mixer = {
            a: stack(lambda n, b=b, h=h: np.moveaxis(split(get(n, f"self_attn.{b}_proj.weight"), h), 2, 0)) for a, b, h in names
        }
        mixer["output"] = stack(lambda n: get(n, "self_attn.o_proj.weight").T.reshape(4, 6, 24))
        if family == "qwen2":
            mixer |= {f"{a}_bias": stack(lambda n, b=b, h=h: split(get(n, f"self_attn.{b}_proj.bias"), h)) for a, b, h in names}
        if family == "qwen3":
            mixer |= {
                f"{a}_norm": {"weight": stack(lambda n, b=b: get(n, f"self_attn.{b}_norm.weight"))} for a, b, _ in names[:2]
            }
        channel = {a: stack(lambda n, a=a: get(n, f"mlp.{a}_proj.weight").T) for a in ("gate", "up", "down")}
        norms = NORMS.get(family, NORMS["llama"])
        norms = {i: {"weight": stack(lambda n, name=name: get(n, f"{name}.weight"))} for i, name in enumerate(norms)}
        slots[slot] = {"mixer": mixer, "channel": channel, "norms": norms}
    made = {"embedding": held["weights/model.embed_tokens.weight"], "slots": slots}
    made["final_norm"] = {"weight": held["weights/model.norm.weight"]}
    return made | ({"head": held["weights/lm_head.weight"].T} if spec.head == "untied" else {})


def compare(family: str, held: dict) -> None:
    spec = decoder(family)
    model = spec.build(rngs=nnx.Rngs(0))
    state = nnx.state(model)
    made = parameters(family, held, spec)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, made))
    nnx.update(model, state)
    segments = np.ones(held["tokens"].shape, np.int32)
    segments[1, : families.PADDING] = 0
    batch = Batch(tokens=jnp.asarray(held["tokens"]), info=causal_info(segments))
    logits = jax.jit(lambda model, batch: model.logits(model(batch)[0]))(model, batch)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(logits)[real], held["logits"][real], atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_golden_logits(family):
    with np.load(Path(__file__).parent / "golden" / f"{family}.npz") as held:
        compare(family, dict(held))


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_live_logits(family):
    compare(family, families.arrays(family))
