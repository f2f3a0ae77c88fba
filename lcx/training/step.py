"""The training step: a pure function of plain dictionaries, compiled ahead of time for a mesh.

Gradients are sums over micro-batches, divided once by the weight summed over devices and accumulation steps. Parameters and
optimizer state are created and kept sharded by the model's rules.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lcx.batch import Batch
from lcx.lora import with_dropout
from lcx.models.decoder import Decoder
from lcx.objectives.objective import Objective
from lcx.record import record
from lcx.spec import SpecError
from lcx.training.optimizer import Optimizer
from lcx.training.placement import parameter_shardings, replicated
from lcx.training.trainable import Path, joined, parted, trained_paths, trained_state

LONGEST = (1 << 31) - 1  # what an int32 index reaches


@record
class TrainState:
    """params: pure dict of float32 arrays. optimizer: optax state. step: updates made, i32[]."""

    params: Any
    optimizer: Any
    step: Any


class TrainStep:
    """A model, its objective and its optimizer on a mesh. `state, results = step.compile(batch)(state, batch)`.

    On an abstract mesh, of devices that are not there, only `abstract_state` can be asked.

    trainable: patterns of the parameters that are trained, None all; the others are frozen (`lcx.training.trainable`).
    results: `sums` (the objective's, with `total_sum`, over the whole batch) and `values` (gradient_norm of what is trained,
    before clipping, parameter_norm after the update, learning_rate), all f32[].
    """

    def __init__(
        self,
        *,
        model: Decoder,
        objective: Objective,
        optimizer: Optimizer,
        mesh: Mesh | AbstractMesh,
        steps: int,
        accumulation: int = 1,
        seed: int = 0,
        trainable: Sequence[str] | None = None,
    ):
        self.spec, self.objective, self.mesh = model, objective, mesh
        self.accumulation, self.seed = accumulation, seed
        self.graph, self.abstract = abstract_model(model)
        self.trained = trained_paths(self.abstract, trainable)
        self.optimizer = optimizer.build(trained_state(self.abstract, self.trained), steps)
        self.learning_rate = optimizer.learning_rate.build(steps)
        self.shardings = self._state_shardings()

    def init(self) -> TrainState:
        """The state before the first update, created in its shards; the same numbers on every mesh."""
        with jax.set_mesh(self.mesh):
            params = jax.jit(self._build, out_shardings=self.shardings.params)()
            return self.start(params)

    def built(self, paths: Collection[Path]) -> Any:
        """Of the parameters before the first update, those of `paths` alone."""
        with jax.set_mesh(self.mesh):
            shardings, _ = parted(self.shardings.params, paths)
            return jax.jit(lambda: parted(self._build(), paths)[0], out_shardings=shardings)()

    def start(self, params: Any) -> TrainState:
        """The state before the first update from given parameters (fine-tuning)."""
        with jax.set_mesh(self.mesh):
            trained, _ = parted(params, self.trained)
            optimizer = jax.jit(self.optimizer.init, out_shardings=self.shardings.optimizer)(trained)
            step = jax.device_put(jnp.zeros((), jnp.int32), self.shardings.step)
            return TrainState(params=params, optimizer=optimizer, step=step)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored to and a plan is compiled with."""
        params = nnx.to_pure_dict(self.abstract)
        optimizer, step = (
            jax.eval_shape(self.optimizer.init, parted(params, self.trained)[0]),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        shapes = TrainState(params=params, optimizer=optimizer, step=step)
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(place, shapes, self.shardings)

    def compile(self, batch: Batch, options: Mapping[str, str | bool] | None = None) -> jax.stages.Compiled:
        """The step compiled for batches like `batch` (arrays on the mesh, or shapes with shardings). Donates the state.

        options: of the compiler."""
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        with jax.set_mesh(self.mesh):
            step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, replicated(self.mesh)))
            return step.lower(self.abstract_state(), jax.tree.map(shape, batch)).compile(options)

    def model(self, params: Any) -> nnx.Module:
        """The module with these parameters."""
        return bind(self.graph, self.abstract, params)

    def totals(self, params: Any, batch: Batch, key: Any) -> tuple[Any, dict[str, Any]]:
        """(gradient of the total by what is trained, sums) over the micro-batches of `batch`; neither divided by the weight."""
        trained, frozen = parted(params, self.trained)
        total = lambda trained, *given: self._total(joined(trained, frozen), *given)
        loss = jax.value_and_grad(total, has_aux=True)
        if self.accumulation == 1:
            (_, sums), gradient = loss(trained, batch, key)
            return gradient, sums

        def body(carry, micro):
            rows, number = micro
            (_, sums), gradient = loss(trained, rows, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, carry, (self._sharded(gradient), sums)), None

        micro = jax.tree.map(functools.partial(_split, parts=self.accumulation), batch)
        first = jax.tree.map(lambda leaf: leaf[0], micro)
        (_, sums), gradient = jax.eval_shape(loss, trained, first, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (gradient, sums))
        carry = (self._sharded(zeros[0]), zeros[1])
        return jax.lax.scan(body, carry, (micro, jnp.arange(self.accumulation)))[0]

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        gradient, sums = self.totals(state.params, batch, key)
        gradient = jax.tree.map(lambda leaf: leaf / sums["weight"], gradient)
        trained, frozen = parted(state.params, self.trained)
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, trained)
        params = joined(optax.apply_updates(trained, updates), frozen)
        values = {
            "gradient_norm": optax.tree.norm(gradient),
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": jnp.asarray(self.learning_rate(state.step), jnp.float32),
        }
        return TrainState(params=params, optimizer=optimizer, step=state.step + 1), {"sums": sums, "values": values}

    def _total(self, params, batch, key):
        model, lora = self.model(params), self.spec.lora
        if lora is not None and lora.dropout:
            key, own = jax.random.split(key)
            model = with_dropout(model, own)
        total, weight, sums = self.objective.loss(model, batch, key)
        return total, sums | {"weight": weight, "total_sum": total}

    def _build(self):
        return nnx.to_pure_dict(nnx.state(self.spec.build(rngs=nnx.Rngs(self.seed))))

    def _sharded(self, trained):
        return jax.lax.with_sharding_constraint(trained, parted(self.shardings.params, self.trained)[0])

    def _state_shardings(self) -> TrainState:
        trained, _ = parted(nnx.to_pure_dict(self.abstract), self.trained)
        sharded, whole = parameter_shardings(self.abstract, self.spec.rules, self.mesh), replicated(self.mesh)
        optimizer = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(self.optimizer.init, trained),
            parted(sharded, self.trained)[0],
            transform_non_params=lambda _: whole,
        )
        return TrainState(params=sharded, optimizer=optimizer, step=whole)


def abstract_model(spec: Decoder) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and shapes of a model, without its arrays.

    Raises SpecError if it holds anything that is not a parameter, or an axis longer than an index.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: spec.build(rngs=nnx.Rngs(0))))
    for path, leaf in nnx.to_flat_state(state):
        if not isinstance(leaf, nnx.Param):
            raise SpecError(
                f"model: {'/'.join(map(str, path))} is {type(leaf).__name__}, not a parameter; nothing would train it"
            )
        if max(leaf.shape, default=0) > LONGEST:
            raise SpecError(
                f"model: parameter {'/'.join(map(str, path))} is of shape {leaf.shape}: expected axes of at most 2^31 - 1"
            )
    return graph, state


def bind(graph: nnx.GraphDef, abstract: nnx.State, params: Any) -> nnx.Module:
    """The module of `graph` with the arrays of a pure dict."""
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _split(leaf: jax.Array, *, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B/parts, ...]: every part takes rows of every device, so no row moves."""
    if leaf.shape[0] % parts:
        raise ValueError(f"accumulation: {leaf.shape[0]} rows do not divide into {parts} micro-batches")
    return jnp.moveaxis(leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]), 1, 0)
