"""Metrics: delayed reading, windows, both conventions of FLOPs, divergence named, one line a step after a resume."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lcx.attention.mask import Causal
from lcx.objectives.language_modeling import LanguageModeling
from lcx.training.flops import Counter, Work
from lcx.training.metrics import Meter, Pending, TrainingDiverged
from lcx.training.writers import Bar, JsonLines, Lines, TensorBoard, Writer, read_records

COUNT = Counter(per_token=10, per_pair={Causal(): 2}, trained_per_token=10)


class Kept(Writer):
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


def meter(kept, *, log_every=2, hosts=1, last_good=lambda: None):
    return Meter(
        log_every=log_every,
        report=LanguageModeling().report,
        counter=COUNT,
        devices=jax.devices()[:4],
        hosts=hosts,
        writers=[kept],
        last_good=last_good,
        first={"compile_seconds": 1.5},
    )


def step(number, loss=2.0, weight=4.0, gradient=1.0):
    sums = {"loss_sum": loss * weight, "weight": weight, "correct": weight / 2, "total_sum": loss * weight}
    values = {"gradient_norm": gradient, "parameter_norm": 3.0, "learning_rate": 0.1 * number}
    results = jax.tree.map(jnp.float32, {"sums": sums, "values": values})
    return Pending(number, results, Work(6, {Causal(): 20}), Work(8, {Causal(): 32}))


def test_a_record_a_window_with_sums_over_it():
    kept = Kept()
    run = meter(kept)
    run.add(step(1, loss=3.0, weight=1.0))
    run.add(step(2, loss=1.0, weight=9.0, gradient=2.0))
    assert kept.records == []  # step 2 may still be running
    run.add(step(3))
    (record,) = kept.records
    assert record["step"] == record["steps_since_last"] == 2
    assert record["loss"] == pytest.approx((3 * 1 + 1 * 9) / 10)
    assert record["accuracy"] == pytest.approx(0.5)
    assert record["gradient_norm"] == pytest.approx(1.5)
    assert record["learning_rate"] == pytest.approx(0.2)
    assert record["compile_seconds"] == 1.5
    run.finish()
    assert [(r["step"], r["steps_since_last"]) for r in kept.records] == [(2, 2), (3, 1)]
    assert [(r["tokens_total"], r["tokens_since_last"]) for r in kept.records] == [(12, 12), (18, 6)]
    assert "compile_seconds" not in kept.records[1]


def test_speed_in_both_conventions_is_of_the_whole_mesh_divided_by_its_devices():
    kept = Kept()
    run = meter(kept, hosts=2)
    run.add(step(1))
    run.finish()
    (record,) = kept.records
    seconds = record["step_seconds"]
    assert record["tokens_total"] == record["tokens_since_last"] == 2 * 6
    assert record["tokens_per_second"] * seconds == pytest.approx(12)
    assert record["device_flops_masked"] * seconds == pytest.approx(2 * 3 * (6 * 10 + 20 * 2) / 4)
    assert record["device_flops_full"] * seconds == pytest.approx(2 * 3 * (8 * 10 + 32 * 2) / 4)
    assert not any(name.startswith("mfu") for name in record)  # a CPU has no peak
    assert record["host_peak_bytes"] > 1e6


@pytest.mark.parametrize("field", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_names_its_first_step_and_the_last_good_checkpoint(field, value):
    run = meter(Kept(), log_every=4, last_good=lambda: 1)
    for pending in (step(1), step(2), step(3, **{field: value}), step(4, loss=float("nan"))):
        run.add(pending)
    with pytest.raises(TrainingDiverged, match=r"diverged at step 3: .*; the last good checkpoint is of step 1") as error:
        run.add(step(5))
    assert (error.value.step, error.value.checkpoint) == (3, 1)


def test_a_batch_without_weight_is_an_error():
    run = meter(Kept())
    run.add(step(1, weight=0.0))
    with pytest.raises(ValueError, match="step 1: no token of the batch has a loss weight"):
        run.finish()


def test_json_lines_after_the_restored_step_are_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, step=0)
    for number in (10, 20, 30):
        first.write({"step": number, "loss": 1.0})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # a process that was killed while writing
    again = JsonLines(path, step=20)
    again.write({"step": 30, "loss": 2.0})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_records(path)
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_event_files_supersede_what_follows_the_restored_step(tmp_path):
    for start, loss in ((0, 1.0), (2, 5.0)):
        events = TensorBoard(tmp_path, step=start)
        for number in range(start + 1, start + 4):
            events.write({"step": number, "loss": loss * number})
        events.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 15), (4, 20), (5, 25)]


def test_plain_line(capsys):
    Lines(steps=9).write({"step": 3, "loss": 1.25, "mfu_masked": 0.5, "mfu_full": 0.75})
    assert capsys.readouterr().err == "step 3/9 loss 1.2500 MFU 50.0% (75.0% counted full)\n"


@pytest.mark.parametrize("columns", [200, 80, 60])
def test_bar_shows_the_step_the_time_left_and_what_figures_have_room(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    bar = Bar(step=1, steps=100_000)
    figures = {"gradient_norm": 1.5, "learning_rate": 1e-3, "tokens_per_second": 13_771.0, "mfu_masked": 0.5, "mfu_full": 0.75}
    bar.write({"step": 3, "loss": 1.25, **figures})
    bar.close()
    shown = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"3/100000 .* -:--:-- +loss 1\.2500", shown)
    assert ("tokens/s MFU 50.0% (75.0% counted full)" in shown) == (columns == 200)
