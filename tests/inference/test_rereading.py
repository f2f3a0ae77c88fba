"""Prompts that are read twice: what stays is what kvpress' KVzip keeps, and answers go on from it."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
from golden import GOLDEN, loaded

from lcx.attention.mask import Causal, Window
from lcx.cache.codecs.codec import Codec
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.plain import Plain
from lcx.cache.codecs.scaled import Int8
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.kvzip import KVzip
from lcx.cache.pruning import Pruning
from lcx.cache.ring import RingCache
from lcx.channels.glu import GLU
from lcx.data.tokenizers import ByteTokenizer
from lcx.inference.engine import Ask, Engine
from lcx.inference.generate import answer, generate
from lcx.inference.language_model import LocalModel
from lcx.inference.reading import feed, nothing_read, prefill
from lcx.inference.rereading import read_again
from lcx.inference.saved import restore, save
from lcx.inference.shapes import right_padded
from lcx.mixers.attention import Attention
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.rotate import rotate
from lcx.positions.visual import Placed
from lcx.spec import SpecError, edit, edits
from tests.cache.driven import FREQUENCIES, SCALE, held_indices, passes, run
from tests.inference.test_cached_generation import MODEL, PROMPTS
from tests.inference.test_sharded_generation import shared_out

CACHE = "pattern[0].mixer.cache"
ZIP = KVzip(keep=0.5, every=12, chunk=24, sinks=2, first=(1, 2), later=(3,), overlap=2, suffix=(4,))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN.parent / "kvzip.npz") as file:
        return {name: file[name] for name in file.files}


@functools.cache
def model(policy=ZIP, codec: Codec | None = None, keys="rotated"):
    cache = DenseCache() if policy is None else KVCache(policy=policy, codec=codec or Plain(), keys=keys)
    return rebuild(MODEL.build(rngs=nnx.Rngs(0)), edit(MODEL, CACHE, cache))


def states(read):
    layers = read.state["layers"]
    if isinstance(layers, list):
        return [period[0] for period in layers]
    return [jax.tree.map(lambda x, n=n: x[n], layers[0]) for n in range(2)]


def kept(state, row, length):
    """(whether each key head has each of its tokens in a slot, their marks)."""
    held = state.held
    there, marks = (np.zeros((held.marks.shape[1], length), kind) for kind in (bool, float))
    for head in range(len(there)):
        own = np.asarray(held.info.segments[row, head]) != 0
        places = np.asarray(held.info.index[row, head])[own]
        there[head, places], marks[head, places] = True, np.asarray(held.marks[row, head])[own]
    return there, marks


@pytest.mark.parametrize("over", ["model", pytest.param("layer", marks=pytest.mark.slow)])
def test_what_kvpress_keeps(over, golden):
    ids = {name: tuple(golden[name].tolist()) for name in ("first", "later", "suffix")}
    spec, model = loaded(GOLDEN / "llama2", MeshSpec().build(jax.devices()[:1]))
    policy = KVzip(keep=0.5, chunk=25, every=8, over=over, **ids)
    model = rebuild(model, edit(spec, CACHE, KVCache(policy=policy)))
    text = golden["ids"].tolist()
    read = prefill(model, [text[:31], text], 2, 8, 16)
    for layer, state in enumerate(states(read)):
        there, marks = kept(state, 1, 60)
        np.testing.assert_array_equal(there, golden[f"kept/{over}"][layer])
        np.testing.assert_allclose(marks, np.where(there, golden["scores"][layer], 0), atol=2e-6)


@pytest.mark.slow
def test_budgets():
    """Of a head, of the heads of a layer, or of all of them; as many slots as a head may fill, and its answer."""
    for over, most in (("head", 36), ("layer", 36 * 2), ("model", 36 * 2)):
        read = prefill(model(dataclasses.replace(ZIP, over=over)), PROMPTS, 4, 8, 16)
        counts = np.stack([(np.asarray(state.held.info.segments) != 0).sum(axis=2) for state in states(read)])
        budgets = np.asarray([len(prompt) // 2 for prompt in PROMPTS])
        assert {state.held.k.shape[2] for state in states(read)} == {min(most + 12, 80)} if over != "head" else {48}
        if over == "head":
            assert (counts == budgets[:, None]).all()
        elif over == "layer":
            assert (counts.sum(axis=2) == 2 * budgets).all() and not (counts == budgets[:, None]).all()
        else:
            assert (counts.sum(axis=(0, 2)) == 4 * budgets).all() and not (counts.sum(axis=2) == 2 * budgets).all()


CODECS = {
    "int8": (Int8(), "rotated", 0.02, 0),
    "int8 groups": (IntGroups(bits=8, group=8), "raw", 0.02, 0),
    "kivi": (KIVI(bits=8, group=8, residual=8), "raw", 0.02, 8),
    "kvquant": (KVQuant(codebook="uniform", bits=4), "raw", 0.2, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_beside_codecs(name):
    """Tokens are looked at as through full precision, but for what codes round; those that wait stay beside the budget."""
    codec, keys, error, recent = CODECS[name]
    whole = dataclasses.replace(ZIP, keep=1.0, over="head")
    exact, coded = (prefill(model(whole, *more), PROMPTS, 4, 8, 16) for more in ((), (codec, keys)))
    for a, b in zip(states(exact), states(coded), strict=True):
        for row, prompt in enumerate(PROMPTS):
            _, wanted = kept(a, row, len(prompt))
            there, marks = kept(b, row, len(prompt))
            np.testing.assert_allclose(marks, np.where(there, wanted, 0), atol=error)
            assert there.sum() > 0 or len(prompt) < 32 + recent
    half = prefill(model(dataclasses.replace(whole, keep=0.5), codec, keys), PROMPTS, 4, 8, 16)
    for a, b in zip(states(coded), states(half), strict=True):
        row, length = 3, len(PROMPTS[3])
        (before, marks), (after, _) = kept(a, row, length), kept(b, row, length)
        for head in range(2):
            order = np.argsort(-np.where(before[head], marks[head] + 9 * (np.arange(length) < ZIP.sinks), -1), kind="stable")
            stay = order[: min(length // 2, before[head].sum())]
            assert np.flatnonzero(after[head]).tolist() == sorted(stay.tolist())
        np.testing.assert_array_equal(a.waiting.info.index, b.waiting.info.index)


@pytest.mark.slow
def test_blocks_leave_an_answer_its_room():
    policy = dataclasses.replace(ZIP, keep=33, over="head")
    read = prefill(model(policy, IntGroups(bits=8, group=8)), [[*range(95)]], 1, 12, 32)
    _, read = answer(model(policy, IntGroups(bits=8, group=8)), read, max_new=12)
    assert [(int(state.overflow[0]), int(state.held.info.index.max())) for state in states(read)] == [(0, 95)] * 2


@pytest.mark.slow
def test_whole_prompts_answer_as_a_dense_cache():
    whole = model(dataclasses.replace(ZIP, keep=1.0))
    wanted, found = (generate(one, PROMPTS, max_new=10, chunk=16) for one in (model(None), whole))
    assert [row.ids for row in found] == [row.ids for row in wanted]


@pytest.mark.slow
def test_a_row_is_alone_with_its_cache():
    together = [row.ids for row in generate(model(), PROMPTS, max_new=10, chunk=64)]
    assert [row.ids for row in generate(model(), PROMPTS[3:], max_new=10, chunk=64)] == together[3:]


@pytest.mark.slow
def test_seated_by_the_engine():
    together = [row.ids for row in generate(model(), PROMPTS, max_new=10, chunk=64)]
    engine = Engine(model(), window=90, rows=2, chunk=16, burst=4)
    found: dict[int, list[int]] = {}
    for piece in engine.run([Ask(prompt=prompt, max_new=10) for prompt in PROMPTS[2:]]):
        found[piece.number] = found.get(piece.number, []) + piece.ids
    assert [found[n] for n in range(2)] == together[2:]


def test_padding_on_the_left():
    zeros = jnp.zeros(4, jnp.int32)
    read = nothing_read(model(), 4, 80, jnp.asarray([n + 8 for n in map(len, PROMPTS)]), zeros.astype(jnp.float32), zeros)
    tokens, segments = right_padded(PROMPTS, 64, 4, 264)
    left = lambda x: np.stack([np.roll(row, 64 - len(prompt)) for row, prompt in zip(x, PROMPTS, strict=True)])
    found = read_again(model(), feed(model(), left(tokens), left(segments), read), PROMPTS)
    wanted = prefill(model(), PROMPTS, 4, 8, 64)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=2e-6)


def test_many_questions_of_one_reading(tmp_path):
    """A folder holds what a context left; a question behind it stands where it would behind the context itself."""
    context, new = PROMPTS[3], 12
    read = prefill(model(), [context], 1, new, 16)
    save(tmp_path / "read", model(), read)
    for question in ([5, 9, 11], [200, 3]):
        read = restore(tmp_path / "read", model())
        tokens, segments = right_padded([question], 4, 1, 264)
        read = feed(model(), tokens, segments, read)
        assert int(read.seen[0]) == len(context) + len(question)
        index = np.asarray(states(read)[0].held.info.index[0, 0])
        assert [*range(len(context), len(context) + len(question))] == sorted(index[index >= len(context)].tolist())
        assert len(answer(model(), read, max_new=6)[0][0].ids) == 6


@pytest.mark.slow
def test_other_layers_read_once():
    """Their states are those of the first reading."""
    local = Attention(heads=4, kv_heads=2, head_dim=8, mask=Window(size=8), cache=RingCache())
    mixers = (MODEL.pattern[0].mixer, local, GatedDeltaNet(heads=2, head_dim=8))
    layers = tuple(Layer(mixer=mixer, channel=GLU(hidden=32)) for mixer in mixers)
    spec = edits(MODEL, [("pattern", layers), ("unroll", 1)])
    plain = spec.build(rngs=nnx.Rngs(0))
    twice = rebuild(plain, edit(spec, CACHE, KVCache(policy=ZIP)))
    once, again = (prefill(one, PROMPTS, 4, 8, 16) for one in (plain, twice))
    for a, b in zip(jax.tree.leaves(once.state["layers"][1:]), jax.tree.leaves(again.state["layers"][1:]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(once.last, again.last, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_on_a_mesh(axis):
    rules = Rules(sequence=(), slots=("context",)) if axis == "context" else Rules()
    wanted = generate(model(), PROMPTS, max_new=6, chunk=16)
    with jax.set_mesh(MeshSpec(**{"data": 2, axis: 2}).build(jax.devices()[:4])):
        there = shared_out(rebuild(model(), edit(model().spec, "rules", rules)), jax.sharding.get_mesh())
        read = prefill(there, PROMPTS, 4, 6, 16)
        found = generate(there, PROMPTS, max_new=6, chunk=16)
    assert read.state["layers"][0][0].held.marks.sharding.spec[0] == "data"
    assert [row.ids for row in found] == [row.ids for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


def test_slots_that_devices_do_not_share_evenly():
    """39 slots are 40 on two devices: what stays and what a query finds are those of one."""
    cache, budget = KVCache(policy=ZIP), jnp.asarray([[20, 31], [9, 30]])
    state = run(cache, passes([40]), length=80)
    marks = np.random.default_rng(1).random(state.held.marks.shape)
    state = dataclasses.replace(state, held=dataclasses.replace(state.held, marks=jnp.asarray(marks, jnp.float32)))
    *_, (q, k, v, info) = passes([40, 1])

    @functools.partial(jax.jit, static_argnames="rules")
    def asked(state, rules):
        state = cache.placed(Pruning(cache, rules=rules).once(state, budget, 39), rules)
        given = cache.append(state, k, v, info, FREQUENCIES)
        turned = rotate(q, info.positions, FREQUENCIES)
        options = {"mask": Causal(), "scale": SCALE, "frequencies": FREQUENCIES, "rules": rules}
        return state, *cache.attend(given, turned, info, **options)

    wanted, *answer = asked(state, Rules())
    with jax.set_mesh(MeshSpec(context=2).build(jax.devices()[:2])):
        found, *answer_found = asked(state, Rules(sequence=(), slots=("context",)))
    assert [x.held.marks.shape[2] for x in (wanted, found)] == [39, 40] and not found.overflow.any()
    assert {piece.data.shape[2] for piece in found.held.marks.addressable_shards} == {20}
    assert held_indices(None, found) == held_indices(None, wanted)
    assert [[len(head) for head in row] for row in held_indices(None, found)] == budget.tolist()
    for one, other in zip(answer_found, answer, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("over, codec, slots", [("model", None, (47, 48)), ("head", IntGroups(bits=8, group=8), (96, 128))])
def test_answers_from_slots_that_devices_do_not_share_evenly(over, codec, slots):
    """Of single tokens, and of blocks of 32, of which three are four on two devices."""
    alone = model(dataclasses.replace(ZIP, keep=0.3, every=11, over=over, spread=1.5), codec)
    read = lambda model: prefill(model, PROMPTS[3:], 1, 6, 64)
    answered = lambda model: (read(model), generate(model, PROMPTS[3:], max_new=6, chunk=64)[0])
    wanted = answered(alone)
    with jax.set_mesh(MeshSpec(context=2).build(jax.devices()[:2])):
        rules = Rules(sequence=(), slots=("context",))
        found = answered(shared_out(rebuild(alone, edit(alone.spec, "rules", rules)), jax.sharding.get_mesh()))
    for a, b in zip(states(found[0]), states(wanted[0]), strict=True):
        assert (b.held.marks.shape[2], a.held.marks.shape[2]) == slots and "context" in a.held.marks.sharding.spec
        for one, other in zip(kept(a, 0, 61), kept(b, 0, 61), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
    assert found[1].ids == wanted[1].ids
    np.testing.assert_allclose(found[1].logprobs, wanted[1].logprobs, atol=2e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"policy\.every = 12: expected at least 13"):
        generate(model(), PROMPTS[:1], max_new=13)
    with pytest.raises(ValueError, match="placed: expected None beside a policy that has prompts read again"):
        prefill(model(), [[1, 2]], 1, 4, 16, [Placed(positions=np.zeros((2, 1), np.float32), following=2.0)])
    read = prefill(model(), PROMPTS[3:], 1, 4, 64)
    for prompts in (PROMPTS[3:], PROMPTS[2:3]):
        with pytest.raises(ValueError, match="expected what the rows hold, all of it, once"):
            read_again(model(), read, prompts)
    for options, words in (
        ({"scope": "both"}, "scope = 'both': expected 'prefill'"),
        ({"overlap": 25}, "overlap = 25: expected 0 to chunk = 24"),
    ):
        with pytest.raises(SpecError, match=words):
            dataclasses.replace(ZIP, **options)

    class Words(ByteTokenizer):
        def encode(self, text):
            return super().encode(text)[::2]

    with pytest.raises(ValueError, match=r"first = the bytes of .*: expected ids of the tokenizer"):
        LocalModel(model(dataclasses.replace(ZIP, first=KVzip(keep=0.5).first)), Words(), window=64)
    layer = MODEL.pattern[0]
    two = [edit(layer, "mixer.cache", KVCache(policy=dataclasses.replace(ZIP, keep=keep))) for keep in (8, 9)]
    for pattern, words in ((two, "expected one for all layers"), ([two[0], layer], "for which it has no room")):
        spec: Decoder = edit(MODEL, "pattern", tuple(pattern))
        with pytest.raises(ValueError, match=words):
            prefill(spec.build(rngs=nnx.Rngs(0)), PROMPTS[:1], 1, 4, 16)
