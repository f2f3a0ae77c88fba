"""The loop: goes on where it stopped, stops when told, says what went wrong."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_runs import experiment

from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import SourceError, TextFolder
from lcx.spec import SpecError, edit
from lcx.training import loop, shipped
from lcx.training.checkpoint import Checkpointing, latest, load_model
from lcx.training.loop import train
from lcx.training.metrics import TrainingDiverged
from lcx.training.optimizer import AdamW
from lcx.training.placement import place_batch
from lcx.training.run_folder import claim, read_config
from lcx.training.schedules import WSD, Constant, Cosine
from lcx.training.writers import Lines, read_records


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
    before = files(tmp_path)
    other = edit(edit(first, "seed", 1), "model.rope.base", 500.0)
    with pytest.raises(SpecError, match=r"they differ first in model\.rope\.base"):
        train(other, tmp_path)
    with pytest.raises(SpecError, match="model, seed changed since the checkpoint of step 2"):
        other.check_continues({"identity": first.identity(), "step": 2, "steps": 2}, tmp_path)
    with pytest.raises(SpecError, match="steps = 4: the run began with 2, which gave step 1 another learning rate"):
        train(edit(first, "steps", 4), tmp_path)
    with pytest.raises(SpecError, match="steps = 1: the run has made 2 already"):
        train(edit(first, "steps", 1), tmp_path)
    with pytest.raises(SpecError, match="init_from = 'reader': the run began without; restore it"):
        train(edit(first, "init_from", "reader"), tmp_path)
    assert files(tmp_path) == before


def files(run_dir):
    """What a start may not change unless it is let pass; the lock says who tried last."""
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "lock"}


def text_run(folder, steps, **options):
    rows = (Weighted(rows=PackedText(source=TextFolder(path=str(folder)))),)
    return experiment(steps=steps, data=Pipeline(mixture=rows, length=48, batch_size=4), **options)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.txt").write_text(f"number {n} of the documents. " * 20)
    return folder


def test_a_refused_first_start_leaves_a_folder_for_the_corrected_one(text, tmp_path):
    (text / "1.txt").write_bytes(b"ok\xff")
    with pytest.raises(SourceError, match="not UTF-8 at byte 2"):
        train(text_run(text, 1), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock", "checkpoints"}
    (text / "1.txt").unlink()
    train(text_run(text, 1, seed=3), tmp_path / "run")
    assert read_config(tmp_path / "run") == text_run(text, 1, seed=3)


def test_a_run_does_not_go_on_over_other_data(text, tmp_path):
    train(text_run(text, 1), tmp_path / "run")
    before = files(tmp_path / "run")
    kept = (text / "1.txt").read_text()
    (text / "1.txt").write_text(kept.replace("number", "NUMBER"))
    with pytest.raises(SpecError, match=r"data\.json: data\.mixture\[0\]\.rows\.source\.crc32 is \d+ now and was \d+ when"):
        train(text_run(text, 2), tmp_path / "run")
    (text / "1.txt").write_text(kept + "more")
    with pytest.raises(SpecError, match=r"source\.bytes is 1624 now and was 1620 when the run began"):
        train(text_run(text, 2), tmp_path / "run")
    assert files(tmp_path / "run") == before
    (text / "1.txt").write_text(kept)
    assert train(text_run(text, 2), tmp_path / "run").step == 2


def test_every_step_is_in_one_record_wherever_the_run_was_cut(tmp_path, monkeypatch):
    """Records every 5 steps, checkpoints every 4; the process dies in step 10, after checkpoint 8 and its record."""

    class Killed(Exception):
        pass

    def dying(batch, *arguments, **options):
        placed.append(batch)
        if len(placed) == 10:
            raise Killed
        return place_batch(batch, *arguments, **options)

    placed = []
    config = experiment(steps=12, every=4, log_every=5)
    monkeypatch.setattr(loop, "place_batch", dying)
    with pytest.raises(Killed):
        train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    train(config, tmp_path / "whole")
    cut, whole = (read_records(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole"))
    counts = ("step", "steps_since_last", "tokens_since_last", "tokens_total", "loss")
    assert [[r[name] for name in counts] for r in cut] == [[r[name] for name in counts] for r in whole]
    assert [r["tokens_total"] for r in cut] == np.cumsum([r["tokens_since_last"] for r in cut]).tolist()
    assert [(r["step"], r["steps_since_last"]) for r in cut] == [(4, 4), (5, 1), (8, 3), (10, 2), (12, 2)]


def test_a_resumed_run_says_so(straight, caplog):
    with caplog.at_level("INFO", logger="lcx"):
        train(experiment(steps=8), straight[0])
    assert "resumed at step 8" in caplog.text


def test_two_trainings_do_not_share_a_folder(straight):
    with claim(straight[0]), pytest.raises(SpecError, match=rf"process {os.getpid()} of .* trains in it now"):
        train(experiment(steps=8), straight[0])
    assert train(experiment(steps=8), straight[0]).step == 8


def test_a_damaged_log_is_refused_by_line(straight, tmp_path):
    train(experiment(steps=2), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(SpecError, match=r"metrics\.jsonl, line 3: not a record"):
        train(experiment(steps=3), tmp_path)


def test_long_schedules_are_compared_at_once():
    before = experiment(steps=300_000, optimizer=AdamW(learning_rate=WSD(peak=1e-2, warmup=10, decay=1000)))
    meta = {"identity": before.identity(), "step": 299_000, "steps": 300_000}
    begin = time.perf_counter()
    edit(before, "steps", 400_000).check_continues(meta, Path("run"))
    with pytest.raises(SpecError, match="which gave step 299001 another learning rate"):
        edit(before, "steps", 400_000).check_continues(meta | {"step": 299_500}, Path("run"))
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_those_that_jax_tells_apart(seed):
    with pytest.raises(SpecError, match=r"Experiment\.seed = .*: expected 0 to 2\^32 - 1"):
        experiment(steps=1, seed=seed)
    assert experiment(steps=1, seed=2**32 - 1)


def test_fine_tuning_begins_with_the_parameters_of_another_run(straight, tmp_path):
    run_dir, source = straight
    tiny = AdamW(learning_rate=Constant(peak=1e-30), decay=0.0)
    tuned = train(experiment(steps=1, optimizer=tiny, init_from=str(run_dir)), tmp_path)
    assert_equal(params(tuned), params(source))
    with pytest.raises(SpecError, match="nowhere': no such run folder, nor a shipped model"):
        train(experiment(steps=1, init_from=str(tmp_path / "nowhere")), tmp_path / "other")


def test_fine_tuning_goes_on_only_from_what_it_began_with(straight, tmp_path):
    """Another spelling of the folder is the same; so is a folder that was moved together with the run."""
    source, run_dir = tmp_path / "a", tmp_path / "a" / "tuned"
    shutil.copytree(straight[0], source)
    train(experiment(steps=1, init_from=str(source)), run_dir)
    for other in (None, str(straight[0]), "reader"):
        with pytest.raises(SpecError, match=r"init_from = .*: the run began with '.*a'; restore it"):
            train(experiment(steps=2, init_from=other), run_dir)
    assert train(experiment(steps=2, init_from=f"{source}/../a"), run_dir).step == 2
    source.rename(tmp_path / "b")
    assert train(experiment(steps=3, init_from=str(tmp_path / "b")), tmp_path / "b" / "tuned").step == 3


@pytest.mark.slow
def test_fine_tuning_may_begin_with_a_shipped_model(tmp_path):
    tiny = AdamW(learning_rate=Constant(peak=1e-30), decay=0.0)
    trained = read_config(shipped.run_folder("reader"))
    config = experiment(steps=1, model=trained.model, optimizer=tiny, init_from="reader")
    tuned = train(config, tmp_path)
    model = load_model(shipped.run_folder("reader"), trained.model)
    assert_equal(params(tuned), jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model))))
    assert train(config, tmp_path).step == 1


def test_a_mesh_trains_to_the_same_parameters_and_saves_for_any_other(straight, tmp_path):
    """Five steps on four devices, three on one. Adam divides by small moments, so rounding grows to 2e-4 of a rate of 1e-2."""
    config = experiment(steps=8, checkpoint=Checkpointing())
    for path, size in (("mesh.fsdp", 2), ("mesh.context", 2), ("mesh.tensor", 1)):
        config = edit(config, path, size)
    assert train(edit(config, "steps", 5), tmp_path).step == 5
    found = train(experiment(steps=8), tmp_path)
    for got, want in zip(jax.tree.leaves(params(found)), jax.tree.leaves(params(straight[1])), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)
