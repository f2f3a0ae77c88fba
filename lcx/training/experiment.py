"""Experiment: the root config of a training run."""

import dataclasses
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from lcx.data.pipeline import Pipeline
from lcx.models.decoder import Decoder
from lcx.objectives.language_modeling import LanguageModeling
from lcx.objectives.objective import Objective
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.spec import Spec, SpecError, edits, fingerprint
from lcx.training.checkpoint import Checkpointing
from lcx.training.optimizer import Optimizer
from lcx.training.step import TrainStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Spec):
    """steps: optimizer updates. accumulation: micro-batches that each update splits the rows of a batch into. seed: of the
    initial parameters. log_every: steps a record. init_from: folder of a run whose newest parameters are the initial ones.
    """

    model: Decoder
    data: Pipeline
    optimizer: Optimizer
    steps: int
    objective: Objective = LanguageModeling()
    mesh: MeshSpec = MeshSpec()
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    checkpoint: Checkpointing = Checkpointing()
    init_from: str | None = None

    def validate(self):
        for field in ("steps", "accumulation", "log_every"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(self.seed >= 0, "seed", "0 or a positive number")
        self.optimizer.learning_rate.build(self.steps)

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
        )

    def identity(self) -> dict[str, Any]:
        """What a run may not change when it goes on from a checkpoint, field by field. The mesh and whatever only decides how
        the same numbers are computed (rules, rematerialisation) may change.
        """
        model = edits(self.model, [("rules", Rules()), ("remat", "none"), ("unroll", 1)])
        parts = {"model": model, "data": self.data, "objective": self.objective, "optimizer": self.optimizer}
        return {name: fingerprint(part) for name, part in parts.items()} | {
            "accumulation": self.accumulation,
            "seed": self.seed,
        }

    def check_continues(self, meta: dict[str, Any]) -> None:
        """Raises SpecError unless this experiment goes on from the checkpoint with this meta as the run that wrote it would."""
        mine, theirs = self.identity(), meta["identity"]
        if changed := [name for name in mine if mine[name] != theirs.get(name)]:
            raise SpecError(
                f"experiment: {', '.join(changed)} changed since the checkpoint of step {meta['step']}; "
                "restore the config, or start another run with init_from"
            )
        if meta["step"] > self.steps:
            raise SpecError(f"Experiment.steps = {self.steps}: the run has made {meta['step']} already; it cannot go back")
        before, now = (self.optimizer.learning_rate.build(steps) for steps in (meta["steps"], self.steps))
        differs = [n for n in range(meta["step"]) if float(before(n)) != float(now(n))] if meta["steps"] != self.steps else []
        if differs:
            raise SpecError(
                f"Experiment.steps = {self.steps}: the run began with {meta['steps']}, which gave step {differs[0]} another "
                "learning rate; only a schedule that is the same so far (constant, WSD before its decay) can go on with others"
            )
