"""Decoders that read by segments give what the authors' loops around the same Llama give: logits, memories and gradients."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_families as families
from flax import nnx

sys.path.append(str(Path(__file__).parents[1] / "models"))
import by_segments

from lcx.batch import Batch, causal_info
from lcx.memory.hmt import HMT
from lcx.memory.rmt import RMT

GOLDEN = Path(__file__).parent / "golden"


def held(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as found:
        return {key: found[key] for key in found}


def built(memory, values: dict[str, np.ndarray]):
    """The golden Llama with a memory that has these parameters."""
    spec = dataclasses.replace(families.decoder("llama"), memory=memory)
    graph, state = nnx.split(spec.build(rngs=nnx.Rngs(0)))
    made = families.parameters("llama", held("llama"), spec) | {"memory": values}
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, made))
    return nnx.merge(graph, state)


@jax.jit
def logits(model, tokens):
    batch = Batch(tokens=tokens, info=causal_info(jnp.ones_like(tokens)))
    return model.logits(model(batch)[0])


def loss(model, tokens, last: int):
    """Mean over the last so many labels, each of the row before."""
    found = jax.nn.log_softmax(logits(model, tokens)[:, :-1])
    chosen = jnp.take_along_axis(found, tokens[:, 1:, None], axis=-1)[..., 0]
    return -chosen[:, -last:].mean()


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))


@jax.jit(static_argnames="last")
def slope(model, tokens, last):
    return jax.value_and_grad(loss)(model, tokens, last)


def test_rmt():
    given = held("rmt")
    model = built(RMT(segment=6, slots=3), {"start": given["memory"]})
    close(logits(model, given["tokens"]), given["left/logits"])
    found, gradient = slope(model, given["tokens"], last=given["tokens"].shape[1] - 1)
    close(found, given["left/loss"])
    close(gradient.memory.start[...], given["left/dmemory"])


@pytest.mark.parametrize("case", ["recall", "apart"])
def test_hmt(case):
    given = held("hmt")
    recall = case == "recall"
    values = {"start": given["start"]}
    if recall:
        values |= {"summary": given["summary"]}
        values |= {f"recall_{name}": given[f"weights/{key}"].T for name, key in (("query", "wq"), ("key", "wk"))}
    memory = HMT(segment=6, sensory=2, bank=2, size=16, recall=recall, query="ahead" if recall else "behind")
    model = built(memory, values)
    close(logits(model, given["tokens"]), given[f"{case}/logits"])
    found, gradient = slope(model, given["tokens"], last=10)
    close(found, given[f"{case}/loss"])
    if recall:
        names = {"summary": "dsummary", "start": "dstart", "recall_query": "dwq", "recall_key": "dwk"}
        for name, wanted in names.items():
            array = getattr(gradient.memory, name)[...]
            close(array.T if "w" in wanted else array, given[f"recall/{wanted}"])


@pytest.mark.parametrize("case", ["accumulate", "replace", "last"])
def test_auto_compressor(case):
    """Segments of other lengths than each other: the loop that `AutoCompressor` is compared with in tests/models."""
    given = held("autocompressor")
    lengths, tokens = [5, 7, 4], given["tokens"]
    model = families.decoder("llama").build(rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, families.parameters("llama", held("llama"), model.spec)))
    model = nnx.merge(graph, state)
    options = {"accumulate": case != "replace", "asked": case != "last"}
    hidden, prompt = by_segments.auto_compressor(model, given["summary"], tokens, lengths, **options)
    close(model.logits(hidden), given[f"{case}/logits"])
    close(prompt, given[f"{case}/softprompt"])
