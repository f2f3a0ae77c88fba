"""What a model in use costs, before it runs: sizes and work of `Serving`, and what the compiler says of its two programs.

A chunk of the prompts is one program, a token of the answers the other; the loop around that adds nothing. No array is made.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.config_text import render
from lcx.inference.generate import decode_step, feed, nothing_decoded, nothing_read
from lcx.inference.sampling import Sampling
from lcx.inference.serving import Serving
from lcx.parallel.hlo import collectives
from lcx.plan import abstract_tree, device_bytes, fitted, listed, memory_figures, model_figures, temporary_figures
from lcx.spec import fingerprint
from lcx.training.flops import counter
from lcx.training.placement import parameter_shardings
from lcx.training.step import abstract_model, bind

# Bytes/s of a device's memory, by the start of its `device_kind` (data sheets). A tpu7x chip is two devices.
BANDWIDTHS = {
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5": 2.765e12,
    "TPU v6 lite": 1.64e12,
    "TPU7x": 7.37e12 / 2,
    "NVIDIA H100": 3.35e12,
    "NVIDIA H200": 4.8e12,
}


def serving_report(serving: Serving) -> str:
    """The resolved config, every field, and its figures."""
    return f"{render(serving, 'config')}\n\n{listed({'fingerprint': fingerprint(serving)} | serving_figures(serving))}"


def serving_figures(serving: Serving) -> dict[str, Any]:
    """Sizes and work by name, of a row and of a token behind a full one."""
    model, length = serving.model, serving.length
    count = counter(model, abstract_model(model)[1])
    last = count.forward(count.documents(1, length)) - count.forward(count.documents(1, length - 1))
    return model_figures(model, (length,)) | {
        f"FLOPs of token {length} of a row, visible pairs only": last,
        "FLOPs of a decoding step of all rows, visible pairs only": serving.rows * last,
    }


def serving_compiled(serving: Serving, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Of the compiled programs, a device: memory by class, what they send by kind. Raises SpecError if one does not fit."""
    mesh = serving.mesh.build(devices)
    kind = mesh.devices.flat[0].device_kind
    found: dict[str, Any] = {"compiled for": f"{mesh.size} x {kind}"}
    with jax.set_mesh(mesh):
        model, read = _abstract_model(serving, mesh), None
        read = _abstract_read(serving, model)
        params = device_bytes(nnx.to_pure_dict(nnx.state(model)))
        state = device_bytes(read.state)
        found |= {"parameter bytes a device": params, "state bytes a device": state}
        for bandwidth in (rate for name, rate in BANDWIDTHS.items() if kind.startswith(name)):
            found["ms to read both once, as a decoded token does"] = 1e3 * (params + state) / bandwidth
        for name, lowered in _programs(serving, model, read):
            begin = time.perf_counter()
            program, most = fitted(lowered.compile, f"{name} of {serving.rows} rows")
            found[f"{name}: compile seconds"] = time.perf_counter() - begin
            figures = memory_figures(program.memory_analysis(), kind)
            sent = {f"{what} bytes sent a device": one.bytes for what, one in collectives(program.as_text()).items()}
            found |= {f"{name}: {figure}": value for figure, value in (figures | temporary_figures(most) | sent).items()}
    return found


def _programs(serving: Serving, model, read):
    """A step of prefill and one of decoding, lowered."""
    rows = serving.rows
    chunk = jax.ShapeDtypeStruct((rows, serving.chunk), jnp.int32)
    yield f"prefill of {serving.chunk} tokens", feed.lower(model, chunk, chunk, read)
    decoding = jax.eval_shape(lambda: nothing_decoded(None, serving.length - serving.chunk, jnp.zeros(rows, bool)))
    decoding = dataclasses.replace(decoding, read=read)
    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)))
    options = {"keys": keys, "stops": jax.ShapeDtypeStruct((1,), jnp.int32), "sampling": Sampling()}
    yield (
        "decoding step",
        jax.jit(decode_step, static_argnames="sampling", donate_argnames="now").lower(model, decoding, **options),
    )


def _abstract_model(serving: Serving, mesh):
    graph, state = abstract_model(serving.model)
    return bind(graph, state, abstract_tree(nnx.to_pure_dict(state), parameter_shardings(state, serving.model.rules, mesh)))


def _abstract_read(serving: Serving, model):
    """Shapes of what the rows have read, where the program that makes them puts them."""
    rows, length = serving.rows, serving.length
    count, place = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    lowered = nothing_read.lower(model, rows, length, count, place, count)
    program, _ = fitted(lowered.compile, f"the empty state of {rows} rows")
    return abstract_tree(lowered.out_info, program.output_shardings)
