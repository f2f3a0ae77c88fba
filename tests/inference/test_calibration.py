"""Calibration: the taps' gradient is that of the loss, tables are of raw keys, k-means is that of the weighted numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Window
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.channels.glu import GLU
from lcx.inference.calibration import codebook, tables, whole_texts
from lcx.inference.generate import generate
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.clex import CLEX
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.spec import SpecError, edit, edits
from tests.inference.test_sharded_generation import shared_out

MODEL = Decoder(
    vocab=64,
    width=32,
    pattern=(Layer(mixer=Attention(heads=4, kv_heads=2, head_dim=8), channel=GLU(hidden=32)),),
    periods=2,
)
ROWS = np.random.default_rng(0).integers(0, 64, (6, 40)).tolist()


@pytest.fixture(scope="module")
def model():
    return MODEL.build(rngs=nnx.Rngs(0))


def test_ranges_are_those_of_keys_before_their_rotation(model):
    """Of the first layer, whose keys are a product of the normed embedding."""
    made = tables(model, ROWS, outliers=(0.0, 0.1), bits=(2, 3))
    mixer = jax.tree.map(lambda x: x[0], model.slots[0])
    x = mixer.norms[0](model.embedding[...][jnp.asarray(ROWS)])
    keys = np.asarray(jnp.einsum("btm,mkd->btkd", x, mixer.mixer.key[...], precision="highest"))[:, 1:].reshape(-1, 2, 8)
    np.testing.assert_allclose(made["raw/0/upper"][0], keys.max(axis=0), atol=2e-5)
    np.testing.assert_allclose(made["raw/0.1/lower"][0], np.percentile(keys, 5, axis=0), atol=2e-5)
    assert made["values/0.1/3/codebook"].shape == (2, 8) and (np.diff(made["raw/0/3/codebook"], axis=1) > 0).all()
    turned = np.abs(made["rotated/0/upper"][0] - made["raw/0/upper"][0]).max()
    assert turned > 0.05


def test_keys_are_rotated_by_what_was_learned():
    model = edit(MODEL, "rope", CLEX(original_length=16, largest=4)).build(rngs=nnx.Rngs(0))
    few = {"outliers": (0.0,), "bits": (2,), "sinks": 0}
    plain = tables(model, ROWS, **few)
    model.rope.down[...] = jax.random.normal(jax.random.key(0), model.rope.down[...].shape) / 4
    made = tables(model, ROWS, **few)
    keys = jax.tree.map(lambda x: x[0], model.slots[0]).mixer.key[...]
    x = jax.tree.map(lambda x: x[0], model.slots[0]).norms[0](model.embedding[...][jnp.asarray(ROWS)])
    keys = jnp.einsum("btm,mkd->btkd", x, keys, precision="highest")
    places, lengths = jnp.broadcast_to(jnp.arange(40.0)[None, :, None], (6, 40, 1)), jnp.full((6, 40), 40)
    wanted = rotate(keys, places, model.rope(), lengths, side="key").max(axis=(0, 1))
    np.testing.assert_allclose(made["rotated/0/upper"][0], wanted, atol=2e-5)
    assert np.abs(plain["rotated/0/upper"][0] - wanted).max() > 0.01


def test_the_tables_are_read_by_the_codec(model, tmp_path):
    np.savez(tmp_path / "t.npz", **tables(model, ROWS))
    calibrated = KVQuant(calibration=str(tmp_path / "t.npz"), bits=4)
    cached = rebuild(model, edit(MODEL, "pattern[0].mixer.cache", KVCache(keys="raw", codec=calibrated)))
    prompt = ROWS[0] + ROWS[1]
    found, wanted = (generate(one, [prompt], max_new=4)[0] for one in (cached, model))
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=0.1)


def test_numbers_that_move_the_loss_draw_centres(model):
    x = np.concatenate([np.linspace(-1, 0, 100), np.linspace(0.5, 1, 10)])
    even, drawn = codebook(x, np.ones(110), 4), codebook(x, np.where(x > 0.4, 1000.0, 1.0), 4)
    assert (even > 0.4).sum() == 1 and (drawn > 0.4).sum() >= 2
    nearest = np.abs(x[:, None] - drawn).argmin(axis=1)
    weight = np.where(x > 0.4, 1000.0, 1.0)
    means = [np.average(x[nearest == n], weights=weight[nearest == n]) for n in range(4)]
    np.testing.assert_allclose(drawn, means, atol=1e-9)  # a fixed point


def test_other_mixers_are_refused(model):
    spec = edit(MODEL, "pattern", (edit(MODEL.pattern[0], "mixer", GatedDeltaNet(heads=2, head_dim=8)),))
    with pytest.raises(SpecError, match="expected plain attention"):
        tables(spec.build(rngs=nnx.Rngs(0)), ROWS)


@pytest.mark.parametrize(
    "mesh, rules",
    [
        (MeshSpec(data=4, tensor=2), Rules()),
        pytest.param(MeshSpec(fsdp=2, tensor=2), Rules(), marks=pytest.mark.slow),
        pytest.param(MeshSpec(context=2), Rules(), marks=pytest.mark.slow),
        pytest.param(MeshSpec(context=2), Rules(sequence=(), slots=("context",)), marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_as_on_one_device(mesh, rules, model):
    """Of six texts, which four devices do not share out."""
    few = {"outliers": (0.1,), "bits": (3,)}
    wanted = tables(model, ROWS, **few)
    with jax.set_mesh(mesh.build(jax.devices()[: mesh.size])):
        placed = shared_out(rebuild(model, edit(MODEL, "rules", rules)), jax.sharding.get_mesh())
        found = tables(placed, ROWS, **few)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=5e-5)


def test_layers_of_several_kinds_have_tables_of_their_own_keys():
    near = edits(MODEL.pattern[0], [("mixer.mask", Window(size=3)), ("mixer.rope", Rope(base=100.0))])
    model = edits(MODEL, [("pattern", (near, MODEL.pattern[0]))]).build(rngs=nnx.Rngs(0))
    made = tables(model, ROWS, outliers=(0.0,), bits=(2,), sinks=0)
    tokens = jnp.asarray(ROWS)
    caches = [(f"pattern[{n}].mixer.cache", DenseCache(keys="raw")) for n in range(2)]
    reader = rebuild(model, edits(model.spec, caches))
    held = reader(whole_texts(tokens), reader.init_state(*tokens.shape))[1]["layers"]
    for layer in range(4):
        period, slot = divmod(layer, 2)
        np.testing.assert_allclose(made["raw/0/upper"][layer], held[slot].k[period].max(axis=(0, 1)), atol=2e-5)
