"""Beacons are laid out as their authors lay them out, and a Llama with them gives the authors' logits, memories and loss."""

import dataclasses
from pathlib import Path

import activation_beacon as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_families as families
from flax import nnx

from lcx.attention.mask import Causal, Chunk, tokens_of
from lcx.batch import Batch, causal_info
from lcx.memory.activation_beacon import ActivationBeacon, lay_out
from lcx.mixers.beacon_attention import _OwnWindow
from lcx.objectives.beacon_modeling import BeaconModeling

GOLDEN = Path(__file__).parent / "golden"
with np.load(GOLDEN / "activation_beacon.npz") as _file:
    HELD = dict(_file)
COVERAGE = {"full-coverage": "full", "step-expansion": "step", "segmentation": "segment"}


def spec_of(case: str) -> ActivationBeacon:
    window, ratios, place, coverage, previous, sink, _, _ = oracle.LAYOUTS[case]
    layout = "interleaved" if place == "interleave" else "appended"
    form = {"layout": layout, "coverage": COVERAGE[coverage], "previous": previous, "sink": sink}
    return ActivationBeacon(window=window, ratio=min(r for r in ratios if r), ratios=tuple(ratios), **form)


def ratios_of(case: str, length: int):
    """The ratio of each token's window; None where all are the spec's."""
    window, ratios, *_, training = oracle.LAYOUTS[case]
    if len(ratios) == 1 and not training:
        return None
    of = [ratios[n % len(ratios)] for n in range(-(-length // window))]
    if training:
        of[-1] = 0
    return jnp.asarray([of[t // window] for t in range(length)])[None]


@pytest.mark.parametrize("case", oracle.LAYOUTS)
def test_layout(case):
    spec, length = spec_of(case), sum(oracle.LAYOUTS[case][-2])
    info = causal_info(np.ones((1, length), np.int32))
    laid = lay_out(spec, info, spec.beacons(length, whole=True, ratio=spec.ratio), ratios_of(case, length))
    place = {**{t: t for t in range(length)}, **{oracle.MARK + n: length + n for n in range(laid.shape[1] - length)}}
    tokens = tokens_of(laid)
    own = _OwnWindow(window=spec.window, coverage=spec.coverage, previous=spec.previous)
    visible = lambda mask, q, k: np.asarray(mask.visible(q.rows(), k.columns()))[0]
    near = visible(Chunk(size=2 * spec.window), tokens, tokens)
    if spec.layout == "appended":
        beacon = np.arange(laid.shape[1]) >= length
        near = np.where(beacon[:, None], visible(own, tokens, tokens), near & ~beacon[None])
    far = visible(Causal(), tokens_of(laid.reading()), tokens_of(laid.held()))
    assert not (near & far).any()
    turn = np.asarray(laid.positions)[0, :, 0]
    get = lambda name, n: HELD[f"layout/{case}/{name}"][n]
    rows = set()
    for n in range(len(HELD[f"layout/{case}/rows"])):
        wanted = {}
        columns = [c for c in get("columns", n) if c >= 0]
        for r, row in enumerate(get("rows", n)):
            if row < 0:
                continue
            places, mask = get("positions", n), get("mask", n)[r]
            asks = places[len(columns) - (get("rows", n) >= 0).sum() + r]
            for c, column in enumerate(columns):
                if mask[c] == 1:
                    wanted[place[row], place[column]] = asks - places[c]
            rows.add(place[row])
        for q in {q for q, _ in wanted}:
            seen = np.flatnonzero(near[q] | far[q])
            assert sorted(k for row, k in wanted if row == q) == seen.tolist()
            for k in seen:
                key = turn[k] if near[q, k] else np.asarray(laid.number)[0, k]
                assert turn[q] - key == wanted[q, k]
    real = np.flatnonzero(np.asarray(laid.segments)[0])
    assert sorted(rows) == real.tolist()


def built(spec):
    model = dataclasses.replace(families.decoder("llama"), memory=spec)
    graph, state = nnx.split(model.build(rngs=nnx.Rngs(0)))
    with np.load(GOLDEN / "llama.npz") as file:
        made = families.parameters("llama", dict(file), model)
    mixer = made["slots"][0]["mixer"]
    for name, letter, heads in (("query", "q", 4), ("key", "k", 2), ("value", "v", 2)):
        of = lambda n, letter=letter: HELD[f"model/weights/model.layers.{n}.self_attn.beacon_{letter}_proj.weight"]
        theirs = np.stack([np.moveaxis(of(n).reshape(heads, 6, 24), 2, 0) for n in range(2)])
        mixer[f"beacon_{name}"] = theirs - mixer[name]
    made["memory"] = {"embedding": HELD["model/weights/model.beacon_embed_tokens.weight"]}
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, made))
    return nnx.merge(graph, state)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("case", oracle.MODELS)
def test_model(case):
    spec = spec_of(case)
    model, tokens = built(spec), jnp.asarray(HELD[f"model/{case}/tokens"])
    length = tokens.shape[1]
    info, ratios = causal_info(np.ones((1, length), np.int32)), ratios_of(case, length)
    batch = Batch(tokens=tokens, info=info, side={} if ratios is None else {"ratios": ratios})
    close(jax.jit(lambda model, batch: model.logits(model(batch)[0]))(model, batch)[0], HELD[f"model/{case}/logits"])
    pieces, training = oracle.LAYOUTS[case][-2:]
    if training:
        weights = jnp.arange(length)[None] < length - 1.0
        batch = Batch(tokens=tokens, info=info, targets=jnp.roll(tokens, -1, 1), loss_weights=weights.astype(jnp.float32))
        objective = BeaconModeling(ratios=(spec.ratio,))
        total, weight, _ = jax.jit(objective.loss)(model, batch, jax.random.key(0))
        close(total / weight, HELD[f"model/{case}/loss"])
        return
    state, at = model.init_state(1, length), 0
    run = jax.jit(lambda model, batch, state: model(batch, state)[:2])
    for piece in pieces:
        part = causal_info(np.ones((1, piece), np.int32), np.asarray([at]))
        _, state = run(model, Batch(tokens=tokens[:, at : at + piece], info=part), state)
        at += piece
    (layers,) = state.decoder["layers"]
    for layer in range(2):
        for name, of in (("key", layers.memory.k), ("value", layers.memory.v)):
            wanted = np.moveaxis(HELD[f"model/{case}/{name}/{layer}"], 1, 2)[0]
            close(of[layer, 0, spec.sink :][: len(wanted)], wanted)
