"""Experiment: the root config of a training run."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lcx.attention.all_gather import AllGather
from lcx.data.pipeline import Pipeline
from lcx.models.decoder import Decoder
from lcx.objectives.language_modeling import LanguageModeling
from lcx.objectives.objective import Objective
from lcx.parallel.layout import Contiguous, Layout
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.spec import Spec, SpecError, edits, fingerprint
from lcx.training import shipped
from lcx.training.checkpoint import Checkpointing
from lcx.training.optimizer import Optimizer
from lcx.training.step import TrainStep

SEEDS = 1 << 32  # `jax.random.key` takes a seed modulo this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Spec):
    """steps: optimizer updates. layout: of the tokens of a row over the devices that share it. accumulation: micro-batches
    that each update splits the rows of a batch into. seed: of the initial parameters. log_every: steps a record; a checkpoint
    ends one early. init_from: folder of a run, or the name of a shipped model, whose newest parameters are the initial ones.
    trainable: patterns of the parameters that are trained, None all (`lcx.training.trainable`).
    """

    model: Decoder
    data: Pipeline
    optimizer: Optimizer
    steps: int
    objective: Objective = LanguageModeling()
    mesh: MeshSpec = MeshSpec()
    layout: Layout = Contiguous()
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    checkpoint: Checkpointing = Checkpointing()
    init_from: str | None = None
    trainable: tuple[str, ...] | None = None

    def validate(self):
        for field in ("steps", "accumulation", "log_every"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(0 <= self.seed < SEEDS, "seed", f"0 to 2^32 - 1 = {SEEDS - 1}, which JAX tells apart")
        try:
            self.optimizer.learning_rate.build(self.steps)
        except SpecError as error:
            raise SpecError(f"optimizer.learning_rate: {error}") from None

    def training_step(self, mesh: Mesh | AbstractMesh) -> TrainStep:
        """The training step of this experiment on a mesh."""
        return TrainStep(
            model=self.model,
            objective=self.objective,
            optimizer=self.optimizer,
            mesh=mesh,
            steps=self.steps,
            accumulation=self.accumulation,
            seed=self.seed,
            trainable=self.trainable,
        )

    def identity(self) -> dict[str, Any]:
        """What a run may not change when it goes on from a checkpoint, field by field. The mesh and whatever only decides how
        the same numbers are computed (layout, rules, communication, rematerialisation, chunks, sums over devices) may change.
        """
        same = [("rules", Rules()), ("communication", AllGather()), ("remat", "none"), ("channel_chunk", None), ("unroll", 1)]
        model = edits(self.model, [*same, ("gradient_sum", "compute")])
        defaults = {field.name: field.default for field in dataclasses.fields(self.objective)}
        objective = edits(self.objective, [(name, defaults[name]) for name in self.objective.free])
        parts = {"model": model, "data": self.data, "objective": objective, "optimizer": self.optimizer}
        return {name: fingerprint(part) for name, part in parts.items()} | {
            "accumulation": self.accumulation,
            "seed": self.seed,
            "trainable": None if self.trainable is None else list(self.trainable),
        }

    def origin(self, run_dir: Path) -> list[str] | None:
        """Names of what the initial parameters are from: `init_from`, its folder, and that relative to the run's own, which
        stays where the two are moved together."""
        if self.init_from is None:
            return None
        known = Path(self.init_from).is_dir() or self.init_from in shipped.names()
        folder = os.path.realpath(shipped.run_folder(self.init_from) if known else self.init_from)
        return [self.init_from, folder, os.path.relpath(folder, os.path.realpath(run_dir))]

    def check_continues(self, meta: dict[str, Any], run_dir: Path) -> None:
        """Raises SpecError unless this experiment goes on in `run_dir` from the checkpoint with this meta as the run that wrote
        it would.
        """
        mine, theirs = self.identity(), meta["identity"]
        if changed := [name for name in mine if mine[name] != theirs.get(name)]:
            raise SpecError(
                f"experiment: {', '.join(changed)} changed since the checkpoint of step {meta['step']}; "
                "restore the config, or start another run with init_from"
            )
        before, now = meta.get("init_from"), self.origin(run_dir)  # earlier versions did not keep it
        if "init_from" in meta and before != now and not set(before or ()) & set(now or ()):
            began = f"with {before[0]!r}" if before else "without"
            raise SpecError(
                f"Experiment.init_from = {self.init_from!r}: the run began {began}; restore it, or give another --run_dir"
            )
        if meta["step"] > self.steps:
            raise SpecError(f"Experiment.steps = {self.steps}: the run has made {meta['step']} already; it cannot go back")
        updates = jnp.arange(meta["step"])
        rates = (self.optimizer.learning_rate.build(steps)(updates) for steps in (meta["steps"], self.steps))
        differs = np.flatnonzero(np.not_equal(*(np.broadcast_to(rate, updates.shape) for rate in rates)))
        if len(differs):
            raise SpecError(
                f"Experiment.steps = {self.steps}: the run began with {meta['steps']}, which gave step {differs[0]} another "
                "learning rate; only a schedule that is the same so far (constant, WSD before its decay) can go on with others"
            )
