"""What a model in use costs, before it runs: sizes and work of `Serving`, and what the compiler says of its two programs.

One reads a chunk of the prompts, the other is the loop that answers. No array is made.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lcx.config_text import render
from lcx.inference.decoding import Asked, decode, nothing_decoded
from lcx.inference.reading import Consumed, feed, nothing_read
from lcx.inference.sampling import SamplingRows
from lcx.inference.serving import Serving
from lcx.inference.shapes import bucket
from lcx.models.decoder import DecoderModel
from lcx.models.light import light
from lcx.parallel.hlo import collectives
from lcx.parallel.mesh import AXES
from lcx.plan import abstract_tree, device_bytes, fitted, listed, memory_figures, model_figures, temporary_figures
from lcx.spec import fingerprint
from lcx.support_rules.walk import sizes
from lcx.training.flops import bandwidth, counter
from lcx.training.placement import parameter_shardings
from lcx.training.step import abstract_model, bind


def serving_report(serving: Serving) -> str:
    """The resolved config, every field, and its figures."""
    return f"{render(serving, 'config')}\n\n{listed({'fingerprint': fingerprint(serving)} | serving_figures(serving))}"


def serving_figures(serving: Serving) -> dict[str, Any]:
    """Sizes and work by name, of a row and of a token behind a full one."""
    model, length = serving.model, serving.length
    count = counter(model, abstract_model(model)[1])
    last = count.forward(count.documents(1, length)) - count.forward(count.documents(1, length - 1))
    return (
        model_figures(model, (length,))
        | _bytes_of(serving)
        | {
            f"FLOPs of token {length} of a row, visible pairs only": last,
            "FLOPs of that token of all rows, visible pairs only": serving.rows * last,
        }
    )


def _bytes_of(serving: Serving) -> dict[str, Any]:
    """Of parameters as they are used, by their shardings, and of the state, which only the compiler lays out on a mesh."""
    rows, length, size = serving.rows, serving.length, serving.mesh.size
    used = _abstract_model(serving, AbstractMesh(tuple(sizes(serving.mesh).values()), AXES))
    state = jax.eval_shape(lambda model: model.init_state(rows, length), used)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    found = {
        "parameter bytes a device, as used": device_bytes(nnx.to_pure_dict(nnx.state(used))),
        f"state bytes of {rows} rows": held,
    }
    least = f"at least {-(-held // size):,}; --topology, which compiles for a slice, says it"
    return found | {"state bytes a device": held if size == 1 else least}


def serving_compiled(serving: Serving, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Of the compiled programs, a device: memory by class, what they send by kind, the loop's a token. Raises SpecError if one
    does not fit."""
    mesh = serving.mesh.build(devices)
    kind = mesh.devices.flat[0].device_kind
    found: dict[str, Any] = {"compiled for": f"{mesh.size} x {kind}"}
    with jax.set_mesh(mesh):
        model = _abstract_model(serving, mesh)
        read = _abstract_read(serving, model)
        params, state = device_bytes(nnx.to_pure_dict(nnx.state(model))), device_bytes(read.state)
        found |= {"parameter bytes a device": params, "state bytes a device": state}
        if (rate := bandwidth(kind)) is not None:
            found["ms to read parameters and the state once, as a token does"] = 1e3 * (params + state) / rate
        for name, lowered in _programs(serving, model, read):
            begin = time.perf_counter()
            program, most = fitted(lowered.compile, f"{name} of {serving.rows} rows")
            found[f"{name}: compile seconds"] = time.perf_counter() - begin
            figures = memory_figures(program.memory_analysis(), kind)
            sent = {f"{what} bytes sent a device": one.bytes for what, one in collectives(program.as_text()).items()}
            found |= {f"{name}: {figure}": value for figure, value in (figures | temporary_figures(most) | sent).items()}
    return found


def program(serving: Serving, devices: Sequence[jax.Device], *, answers: bool = True) -> tuple[jax.stages.Compiled, Any]:
    """The loop of the answers, or a step of the prefill, compiled, and the shapes of the states that it carries."""
    mesh = serving.mesh.build(devices)
    with jax.set_mesh(mesh):
        model = _abstract_model(serving, mesh)
        read = _abstract_read(serving, model)
        (_, prefill), (_, loop) = _programs(serving, model, read)
        return (loop if answers else prefill).compile(), read.state


def _programs(serving: Serving, model: DecoderModel, read: Consumed) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """A step of prefill and the loop of the answers, whose text counts one token."""
    rows = serving.rows
    chunk = jax.ShapeDtypeStruct((rows, serving.chunk), jnp.int32)
    yield f"prefill of {serving.chunk} tokens", feed.lower(model, chunk, chunk, read)
    made = jax.eval_shape(lambda read: nothing_decoded(read, bucket(serving.answer), jnp.zeros(rows, bool)), read)
    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)))
    whole, share = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    sampling = SamplingRows(temperature=share, top_k=whole, top_p=share, min_p=share)
    stops, end = jax.ShapeDtypeStruct((rows, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    decoding = dataclasses.replace(made, read=read)  # with its shardings
    asked = Asked(key=keys, sampling=sampling, stops=stops, made=whole, limit=whole)
    yield "answers, a token", decode.lower(model, decoding, asked, end)


def _abstract_model(serving: Serving, mesh: Mesh | AbstractMesh) -> DecoderModel:
    """As it is used: a learned rope is solved, matrices are held in `compute`."""
    graph, state = abstract_model(serving.model)
    model = bind(graph, state, abstract_tree(nnx.to_pure_dict(state), parameter_shardings(state, serving.model.rules, mesh)))
    if hasattr(model.rope, "settled"):
        model.rope = nnx.eval_shape(lambda rope: rope.settled(), model.rope)
    return light(model)


def _abstract_read(serving: Serving, model: DecoderModel) -> Consumed:
    """Shapes of what the rows have read, where the program that makes them puts them."""
    count, place = (jax.ShapeDtypeStruct((serving.rows,), dtype) for dtype in (jnp.int32, jnp.float32))
    lowered = nothing_read.lower(model, serving.rows, serving.length, count, place, count)
    program, _ = fitted(lowered.compile, f"the empty state of {serving.rows} rows")
    return abstract_tree(lowered.out_info, program.output_shardings)
