"""A light model answers as the one that it was made of, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.channels.mlp import MLP
from lcx.lora import LoRA
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.models.light import light


@pytest.mark.parametrize("scale, head, lora", [(1.0, "tied", None), (2.5, "tied", None), (1.0, "untied", LoRA(rank=2))])
def test_answers_are_the_same(scale, head, lora):
    mixer = Attention(heads=2, kv_heads=1, head_dim=8, bias="all")
    pattern = tuple(Layer(mixer=mixer, channel=channel) for channel in (GLU(hidden=24), MLP(hidden=16)))
    spec = Decoder(vocab=32, width=16, pattern=pattern, periods=2, head=head, embed_scale=scale, lora=lora, compute="bfloat16")
    model = spec.build(rngs=nnx.Rngs(0))
    model = nnx.merge(*(lambda graph, state: (graph, jax.tree.map(lambda x: x + 0.01, state)))(*nnx.split(model)))
    batch = Batch(tokens=jnp.arange(12).reshape(2, 6), info=causal_info(jnp.ones((2, 6), jnp.int32)))
    answer = jax.jit(lambda model: model.logits(model(batch)[0]))
    few = light(model)
    np.testing.assert_array_equal(answer(few), answer(model))
    size = lambda model: sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    assert size(few) < 0.62 * size(model)
    assert light(few) is not few and size(light(few)) == size(few)
