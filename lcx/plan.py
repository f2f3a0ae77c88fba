"""What a config will cost, before it runs: parameters, bytes, FLOPs, wavelengths; and what the compiler says of its step.

Nothing here makes an array: `report` traces, `compiled` compiles for the given devices, real ones or a described topology.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from lcx.attention.attend import KERNELS
from lcx.attention.count import document_pairs
from lcx.attention.planner import ROOM, Work, estimates, explain, link_rate, sample_balance, shards_seen
from lcx.attention.ring import full_journeys
from lcx.batch import Batch, causal_info
from lcx.config_text import render
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.position_figures import position_figures
from lcx.parallel.hlo import collectives
from lcx.parallel.mesh import AXES
from lcx.parallel.temporaries import Temporary, compiled_with_temporaries
from lcx.parallel.topology import CHIP_MEMORY
from lcx.spec import SpecError, below, edits, fingerprint
from lcx.support_rules.walk import sequence_axes, sizes
from lcx.training.experiment import Experiment
from lcx.training.flops import counter, peak, query_halves
from lcx.training.optimizer import groups
from lcx.training.placement import batch_shardings
from lcx.training.step import abstract_model, bind
from lcx.training.trainable import parted


def report(experiment: Experiment) -> str:
    """The resolved config, every field, and its figures."""
    return f"{render(experiment, 'config')}\n\n{listed({'fingerprint': fingerprint(experiment)} | figures(experiment))}"


def listed(found: dict[str, Any]) -> str:
    """Figures, one a line."""
    return "\n".join(f"{name:<48} {shown(value)}" for name, value in found.items())


def shown(value: Any) -> str:
    """A figure as text: thousands separated, floats to four digits."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def figures(experiment: Experiment) -> dict[str, Any]:
    """Sizes, work and memory of a training run by name. Per-device bytes are those of the fullest device."""
    model, data = experiment.model, experiment.data
    _, state = abstract_model(model)
    rows, length = data.batch_size, data.length
    step = experiment.training_step(AbstractMesh(tuple(sizes(experiment.mesh).values()), AXES))
    held, count = step.abstract_state(), counter(model, state, step.trained, experiment.objective.drawn_ratios)
    trained, _ = parted(held.params, step.trained)
    work, full = count.documents(rows, length), count.full(rows, length)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(held.params))
    return {
        "parameters": parameters,
        "  of them embeddings": _embeddings(state),
        "parameter bytes": _bytes(held.params),
        "gradient bytes": _bytes(trained),
        "optimizer bytes": _bytes(held.optimizer),
        "parameter, gradient, optimizer bytes a device": sum(map(device_bytes, (held.params, trained, held.optimizer))),
        "activation bytes kept for backward, all devices": activation_bytes(experiment),
        "tokens a step": work.tokens,
        "tokens of the run": work.tokens * experiment.steps,
        "tokens a parameter": work.tokens * experiment.steps / parameters,
        "training FLOPs a step, visible pairs only": count.train(work),
        "training FLOPs a step, all pairs": count.train(full),
        "training FLOPs a token, visible pairs only": count.train(work) / work.tokens,
        "training FLOPs a token, all pairs": count.train(full) / work.tokens,
        "training FLOPs of the run, visible pairs only": count.train(work) * experiment.steps,
        "distances in rows": f"below {data.spread:,}",
        **_blind(model, length),
        **position_figures(model, length, spread=data.spread),
    }


def model_figures(
    model: Decoder, lengths: Sequence[int], trained: int | None = None, spread: int | None = None
) -> dict[str, Any]:
    """Sizes and work of using a model, by name: a forward pass over a row, and the state that a row decodes with. trained: the
    tokens of the rows that it was trained on; spread: the distances in them."""
    graph, state = abstract_model(model)
    params, count = nnx.to_pure_dict(state), counter(model, state)
    found: dict[str, Any] = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "  of them embeddings": _embeddings(state),
        "parameter bytes": _bytes(params),
    }
    for length in lengths:
        held = jax.eval_shape(lambda p, length=length: bind(graph, state, p).init_state(1, length), params)
        found[f"forward FLOPs a row of {length}, visible pairs only"] = count.forward(count.documents(1, length))
        found[f"forward FLOPs a row of {length}, all pairs"] = count.forward(count.full(1, length))
        found[f"state bytes a row of {length}"] = _bytes(held)
    return found | position_figures(model, max(lengths), trained, spread)


LARGEST = 6  # temporaries that are named
COMPACT = (
    "parameters",
    "parameter, gradient, optimizer bytes a device",
    "activation bytes kept for backward, all devices",
    "tokens of the run",
    "training FLOPs of the run, visible pairs only",
)


def compared(runs: dict[str, Experiment]) -> str:
    """The figures that tell what training runs cost, side by side; runs of one cost share a block."""
    alike: dict[str, list[str]] = {}
    for name, experiment in runs.items():
        found = figures(experiment)
        alike.setdefault(listed({figure: found[figure] for figure in COMPACT}), []).append(name)
    heads = ((names[0] if len(names) == 1 else f"each of {'; '.join(names)}", text) for text, names in alike.items())
    return "\n\n".join(f"{head}\n{text}" for head, text in heads)


def activation_bytes(experiment: Experiment) -> int:
    """Bytes that the forward pass of a micro-batch keeps for its backward pass, by tracing, unsharded; XLA may keep less."""
    graph, state = abstract_model(for_any_platform(experiment.model))
    params = nnx.to_pure_dict(state)
    data = experiment.data
    batch = abstract_batch(data.batch_size // experiment.accumulation, data.length, data.position_axes)

    def kept(params, batch):
        key = jax.random.key(0)
        return jax.vjp(lambda p: experiment.objective.loss(bind(graph, state, p), batch, key)[0], params)[1]

    return max(0, _bytes(jax.eval_shape(kept, params, batch)) - _bytes(params))


def for_any_platform(model: Decoder) -> Decoder:
    """The model with the attention form that this machine has, where it names another platform's."""
    own = [path for path, part in below(model) if isinstance(part, Attention) and part.backend in KERNELS]
    return edits(model, [(f"{path}.backend", "auto") for path in own])


def abstract_batch(rows: int, length: int, axes: int = 1) -> Batch:
    """Shapes of a batch of one document a row, with so many position axes."""

    def zeros():
        ids = jnp.zeros((rows, length), jnp.int32)
        info = causal_info(ids)
        info = dataclasses.replace(info, positions=jnp.repeat(info.positions, axes, axis=-1))
        return Batch(tokens=ids, info=info, targets=ids, loss_weights=ids.astype(jnp.float32))

    return jax.eval_shape(zeros)


def compiled(experiment: Experiment, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Of the compiled training step, a device: memory by class, what it sends by kind. Raises SpecError if it does not fit."""
    mesh = experiment.mesh.build(devices)
    data = experiment.data
    batch = abstract_batch(data.batch_size, data.length, data.position_axes)
    batch = abstract_tree(batch, batch_shardings(batch, experiment.model.rules, mesh))
    step, begin = experiment.training_step(mesh), time.perf_counter()
    program, most = fitted(lambda options: step.compile(batch, options), "the training step")
    kind, state = mesh.devices.flat[0].device_kind, step.abstract_state()
    return {
        "compiled for": f"{mesh.size} x {kind}",
        "compile seconds": time.perf_counter() - begin,
        "parameter bytes a device": device_bytes(state.params),
        "optimizer bytes a device": device_bytes(state.optimizer),
        "batch bytes a device": device_bytes(batch),
        **memory_figures(program.memory_analysis(), kind),
        **temporary_figures(most),
        **collective_figures(program.as_text(), mesh.shape),
    }


def abstract_tree(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, shardings)


def fitted(compile: Callable, name: str) -> tuple[jax.stages.Compiled, list[Temporary]]:
    """The program of `compile(compiler options)` and its largest temporaries. Raises SpecError, with what takes most, if it
    does not fit its devices."""
    try:
        return compiled_with_temporaries(compile, LARGEST)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise SpecError(f"{name} does not fit its devices: {largest_allocations(str(error))}") from None


def temporary_figures(most: list[Temporary]) -> dict[str, Any]:
    """The largest temporaries, which need not exist at the same time, each with the operations that it comes from."""
    return {f"temporary {n}": f"{one.bytes:,} bytes, {one.shape} of {one.name}" for n, one in enumerate(most, 1)}


def memory_figures(memory: Any, kind: str) -> dict[str, Any]:
    """What the compiler says of a program's memory a device, and whether it fits a chip of this kind."""
    arguments, outputs, aliased = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes
    temporary, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    total = arguments + outputs - aliased + temporary + code
    found = {
        "argument bytes a device": arguments,
        "output bytes a device beyond the arguments": outputs - aliased,
        "temporary bytes a device": temporary,
        "generated code bytes a device": code,
        "total bytes a device": total,
    }
    for name in ("argument", "output", "alias", "temp", "generated_code"):
        if size := getattr(memory, f"host_{name}_size_in_bytes", 0):
            found[f"{name.replace('_', ' ')} bytes on the host"] = size
    if kind in CHIP_MEMORY:
        spare = CHIP_MEMORY[kind] - total / (1 << 30)
        found["fits"] = f"{'yes' if spare >= 0 else 'no'}, by {abs(spare):.2f} GiB of {CHIP_MEMORY[kind]}"
    return found


def collective_figures(text: str, mesh_shape: Mapping[str, int]) -> dict[str, Any]:
    """Bytes that a device sends a step by kind, in rings as if every key were seen from every device."""
    found = {}
    for kind, sent in collectives(text, full_journeys(mesh_shape)).items():
        found[f"{kind} bytes sent a device and step{', all keys seen' if sent.assumed else ''}"] = sent.bytes
    return found


def largest_allocations(message: str) -> str:
    """Of the compiler's report that memory does not suffice, the totals, and sizes and names of what takes most.

    Where the temporaries alone are too large the compiler gives the totals only.
    """
    lines = [line.strip() for line in message.strip().splitlines()]
    kept = re.compile(r"\d+\. Size:|Operator:|Shape:|XLA label:|Total hbm usage|(reserved|program|arguments) +[\d.]+[KMGT]?B?$")
    return "\n  ".join([lines[0], *(line for line in lines[1:] if kept.match(line))])


def communication_report(experiment: Experiment, device_kind: str) -> str:
    """What each communication would cost the attention layers of the experiment on such devices, and which is advised."""
    flops, link = peak(device_kind), link_rate(device_kind)
    axes, mesh, rules = sequence_axes(experiment), sizes(experiment.mesh), experiment.model.rules
    if not axes:
        return "no communication of attention: each row is whole on a device"
    if flops is None or link is None:
        return f"no estimate of communication: the links of {device_kind} are in no table"
    if experiment.model.memory is not None:
        return f"no estimate of communication beside {type(experiment.model.memory).__name__}, which says what tokens see"
    length, shards = experiment.data.length, math.prod(axes.values())
    rows = max(1, experiment.data.batch_size // experiment.accumulation // math.prod(mesh[axis] for axis in rules.batch))
    blocks = []
    for i, layer in enumerate(experiment.model.pattern):
        if not isinstance(mixer := layer.mixer, Attention):
            continue
        shared = f"communication of pattern[{i}] over {' x '.join(f'{axis} {size}' for axis, size in axes.items())}"
        if mixer.distances is not None and mixer.distances.reads_queries:
            blocks.append(f"{shared}: no estimate for {mixer.distances}, whose keys carry queries")
            continue
        heads = mixer.heads // math.prod(mesh[axis] for axis in rules.heads)
        work = Work(
            rows=rows,
            length=length,
            heads=heads,
            kv_heads=max(1, heads * mixer.kv_heads // mixer.heads),
            head_dim=mixer.head_dim,
            pairs=document_pairs(mixer.mask, length),
            itemsize=jnp.dtype(experiment.model.compute).itemsize,
            halves=query_halves(mixer),
        )
        even = sample_balance(mixer.mask, experiment.layout, shards, length)
        head = (
            f"{shared}, {type(experiment.layout).__name__} layout, balance {even.devices:.3f}, of ring steps {even.steps:.3f}"
        )
        seen = functools.partial(shards_seen, mixer.mask, experiment.layout, shards, length)
        found = estimates(work, axes, even, flops=flops, link=link, seen=seen)
        blocks.append(f"{head}\n{explain(found, ROOM)}")
    return "\n\n".join(blocks)


def _blind(model: Decoder, length: int) -> dict[str, str]:
    """Attention that sees no pair of a causal document, if the model has some."""
    masks = {path: part.mask for path, part in below(model, "model") if isinstance(part, Attention)}
    return {f"seen by {path}": f"nothing, by {mask}" for path, mask in masks.items() if not document_pairs(mask, length)}


def _embeddings(state: nnx.State) -> int:
    named = zip(jax.tree.leaves(groups(state)), jax.tree.leaves(nnx.to_pure_dict(state)), strict=True)
    return sum(leaf.size for group, leaf in named if group == "embeddings")


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def device_bytes(tree: Any) -> int:
    """Bytes of arrays, or of shapes with shardings, on one device."""
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(shard, jax.tree.leaves(tree)))
