"""AdamW: parameter groups by name, clipping, one update worked out by hand, float32 moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.norms import LayerNorm, RMSNorm
from lcx.spec import SpecError
from lcx.training.optimizer import AdamW, groups
from lcx.training.schedules import Constant
from lcx.training.step import abstract_model

MODEL = Decoder(
    vocab=8,
    width=4,
    pattern=(
        Layer(
            mixer=Attention(heads=2, kv_heads=1, head_dim=2, bias="all", qk_norm=RMSNorm()),
            channel=GLU(hidden=6, bias=True),
            norm=LayerNorm(),
        ),
    ),
    periods=2,
    embed_mixer=ShortConvolution(taps=2),
    head="untied",
)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def test_groups_go_by_what_a_parameter_is():
    """Biases of heads and stacked norms have two axes and more, yet are no matrices."""
    found = named(groups(abstract_model(MODEL)[1]))
    wanted = {"embedding": "embeddings", "head": "matrices", "embed_mixer/kernel": "matrices", "final_norm/weight": "norms"}
    slot = {
        "matrices": ("mixer/query", "mixer/key", "mixer/value", "mixer/output", "channel/gate", "channel/up", "channel/down"),
        "norms": ("mixer/query_norm/weight", "mixer/key_norm/weight"),
        "biases": ("mixer/query_bias", "mixer/key_bias", "mixer/value_bias", "mixer/output_bias"),
    }
    slot["norms"] += tuple(f"norms/{n}/weight" for n in (0, 1))
    slot["biases"] += tuple(f"norms/{n}/bias" for n in (0, 1)) + tuple(f"channel/{n}_bias" for n in ("gate", "up", "down"))
    wanted |= {f"slots/0/{name}": group for group, names in slot.items() for name in names}
    assert found == wanted


@pytest.mark.parametrize("decayed", [(), ("matrices",), ("embeddings", "norms"), ("matrices", "biases")])
def test_with_no_gradient_only_the_decayed_groups_shrink(decayed):
    _, state = abstract_model(MODEL)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), nnx.to_pure_dict(state))
    optimizer = AdamW(learning_rate=Constant(peak=0.5), decay=0.1, decayed=decayed).build(state, steps=3)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for name, update in named(updates).items():
        wanted = -0.5 * 0.1 if named(groups(state))[name] in decayed else 0.0
        np.testing.assert_allclose(update, wanted, rtol=1e-6)


def test_first_update_by_hand():
    """The first update of Adam is -rate * g / (|g| + eps): bias correction undoes both betas. Clipping scales g before."""
    _, state = abstract_model(MODEL)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), nnx.to_pure_dict(state))
    optimizer = AdamW(learning_rate=Constant(peak=0.5), decay=0.0, eps=0.25, clip=3.0).build(state, steps=3)
    gradient = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), params)
    norm = 2.0 * sum(leaf.size for leaf in jax.tree.leaves(params)) ** 0.5
    updates, moments = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    clipped = 2.0 * 3.0 / norm
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.5 * clipped / (clipped + 0.25), rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(moments) if leaf.ndim} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("field", "value"), [("beta1", 1.0), ("eps", 0.0), ("decay", -0.1), ("clip", 0.0), ("decayed", ("norms", "norms"))]
)
def test_impossible_fields_are_refused(field, value):
    with pytest.raises(SpecError, match=f"AdamW.{field} = "):
        AdamW(learning_rate=Constant(peak=1.0), **{field: value})
