"""The loop: goes on where it stopped, stops when told, says what went wrong."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from tiny_runs import experiment

from lcx.spec import SpecError, edit
from lcx.training import loop
from lcx.training.checkpoint import Checkpointing, latest
from lcx.training.loop import train
from lcx.training.metrics import TrainingDiverged
from lcx.training.optimizer import AdamW
from lcx.training.placement import place_batch
from lcx.training.schedules import Constant, Cosine
from lcx.training.writers import Lines, read_records


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The programs of this file are the same few: they are compiled once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for settings in (options, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is options:
            yield


def params(result):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(result.model)))


def assert_equal(found, wanted):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Eight steps without interruption, with their folder."""
    run_dir = tmp_path_factory.mktemp("straight")
    return run_dir, train(experiment(steps=8), run_dir)


def losses(run_dir):
    return {record["step"]: record["loss"] for record in read_records(run_dir / "metrics.jsonl")}


def test_a_run_that_goes_on_equals_one_that_was_never_interrupted(straight, tmp_path):
    run_dir, wanted = straight
    assert train(experiment(steps=3), tmp_path).step == 3
    found = train(experiment(steps=8), tmp_path)
    assert (found.step, found.status, found.exit_status) == (8, "completed", 0)
    assert_equal(params(found), params(wanted))
    assert losses(tmp_path) == losses(run_dir)
    assert sorted(losses(tmp_path)) == list(range(1, 9))
    assert json.loads((tmp_path / "data.json").read_text()) == experiment(steps=8).data.counts()


def test_a_complete_run_is_only_loaded(straight):
    run_dir, wanted = straight
    again = train(experiment(steps=8), run_dir)
    assert (again.step, again.status, again.metrics) == (8, "completed", wanted.metrics)
    assert_equal(params(again), params(wanted))


def test_sigterm_saves_and_says_so(straight, tmp_path, monkeypatch):
    class Terminating(Lines):
        def write(self, record):
            if record["step"] == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "terminal", lambda *, step, steps: Terminating(steps=steps))
    stopped = train(experiment(steps=8), tmp_path)
    monkeypatch.undo()
    assert (stopped.status, stopped.exit_status) == ("terminated", 143)
    assert 4 <= stopped.step < 8
    assert latest(tmp_path) == stopped.step
    assert signal.getsignal(signal.SIGTERM) is before
    assert_equal(params(train(experiment(steps=8), tmp_path)), params(straight[1]))


def test_divergence_stops_with_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    """An infinite loss weight at step 6 of a run that saves every 2 steps; the log is read every 3."""
    placed = []

    def poisoned(batch, *arguments, **options):
        placed.append(batch)
        weights = batch.loss_weights + np.float32(np.inf if len(placed) == 6 else 0)
        return place_batch(dataclasses.replace(batch, loss_weights=weights), *arguments, **options)

    monkeypatch.setattr(loop, "place_batch", poisoned)
    with pytest.raises(TrainingDiverged, match=r"diverged at step 6: .*; the last good checkpoint is of step 4") as error:
        train(experiment(steps=12, every=2, log_every=3), tmp_path)
    assert (error.value.step, error.value.checkpoint, latest(tmp_path)) == (6, 4, 4)


def test_a_run_may_not_change_what_it_is(tmp_path):
    first = experiment(steps=2, optimizer=AdamW(learning_rate=Cosine(peak=1e-2)))
    train(first, tmp_path)
    with pytest.raises(SpecError, match="model, seed changed since the checkpoint of step 2"):
        train(edit(edit(first, "seed", 1), "model.rope.base", 500.0), tmp_path)
    with pytest.raises(SpecError, match="steps = 4: the run began with 2, which gave step 1 another learning rate"):
        train(edit(first, "steps", 4), tmp_path)
    with pytest.raises(SpecError, match="steps = 1: the run has made 2 already"):
        train(edit(first, "steps", 1), tmp_path)


def test_fine_tuning_begins_with_the_parameters_of_another_run(straight, tmp_path):
    run_dir, source = straight
    tiny = AdamW(learning_rate=Constant(peak=1e-30), decay=0.0)
    tuned = train(experiment(steps=1, optimizer=tiny, init_from=str(run_dir)), tmp_path)
    assert_equal(params(tuned), params(source))
    with pytest.raises(SpecError, match="no checkpoint"):
        train(experiment(steps=1, init_from=str(tmp_path / "nowhere")), tmp_path / "other")


def test_a_mesh_trains_to_the_same_parameters_and_saves_for_any_other(straight, tmp_path):
    """Five steps on four devices, three on one. Adam divides by small moments, so rounding grows to 2e-4 of a rate of 1e-2."""
    config = experiment(steps=8, checkpoint=Checkpointing())
    for path, size in (("mesh.fsdp", 2), ("mesh.context", 2), ("mesh.tensor", 1)):
        config = edit(config, path, size)
    assert train(edit(config, "steps", 5), tmp_path).step == 5
    found = train(experiment(steps=8), tmp_path)
    for got, want in zip(jax.tree.leaves(params(found)), jax.tree.leaves(params(straight[1])), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)
