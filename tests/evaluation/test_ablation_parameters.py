"""An ablation's rows are of the parameters that its folders, or the models that its arms name, began with."""

import dataclasses
import re
import shutil

import jaxtyping
import pytest

from experiments import ablate, program
from lcx.config import dumps
from lcx.evaluation import ablation as module
from lcx.evaluation.ablation import Arm, run
from lcx.positions.linear import LinearInterpolation
from lcx.spec import SpecError, edit, edits
from lcx.training import shipped
from lcx.training.loop import train
from lcx.training.run_folder import open_run, read_config


@pytest.mark.parametrize("trained", ["one", "one/fine-tuned-interpolation-x1"])
def test_rows_of_other_parameters_are_refused(ablation, finished, trained, monkeypatch, nothing):
    """The same config may have been trained again by another version."""
    monkeypatch.setattr(module, "append_rows", nothing)
    retrain(read_config(finished / trained), finished / trained)
    with pytest.raises(SpecError, match=rf"rows of parameters \w+ of .*/{trained}, which now holds \w+: .*another --run_dir"):
        run(ablation, finished)


def test_parameters_trained_again_are_compared_with_the_rows(ablation, finished, monkeypatch, nothing):
    results = finished / "results.jsonl"
    results.write_text("".join(line for line in results.read_text().splitlines(keepends=True) if '"length": 16,' in line))
    shutil.rmtree(finished / "one")
    monkeypatch.setattr(module, "append_rows", nothing)
    monkeypatch.setattr(module, "train", retrain)
    with pytest.raises(SpecError, match="rows of parameters"):
        run(ablation, finished, say=lambda _: None)


def retrain(experiment, folder):
    """Training that comes to other parameters than the config would."""
    shutil.rmtree(folder, ignore_errors=True)
    return train(edit(experiment, "optimizer.learning_rate.peak", 3e-3), folder)


def test_a_stopped_training_is_not_taken_for_another_one(ablation, tmp_path, monkeypatch, nothing):
    """Before the first row nothing but the arm's folder tells whose training it holds."""

    def stop(experiment, folder):
        (open_run(folder, experiment) / "metrics.jsonl").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(ablation, tmp_path, say=lambda _: None)
    monkeypatch.setattr(module, "train", nothing)
    for path, value in (("base.seed", 5), ("base.steps", 3)):
        with pytest.raises(SpecError, match=rf"they differ first in {path}: .*--run_dir"):
            run(edit(ablation, path, value), tmp_path)
        (tmp_path / "config.json").write_text(dumps(edit(ablation, path, value)))
        with pytest.raises(SpecError, match=f"one was trained with another config, first in {path[5:]}: .*--run_dir"):
            run(edit(ablation, path, value), tmp_path)
        (tmp_path / "config.json").write_text(dumps(ablation))
    (tmp_path / "one" / "config.json").unlink()
    monkeypatch.setattr(module, "train", train)
    with pytest.raises(SpecError, match=r"one: holds files but no config\.json"):
        run(ablation, tmp_path)


@pytest.mark.parametrize("place", [".", "one", "one/fine-tuned-interpolation-x1"])
def test_a_shipped_model_is_not_trained_on_in_its_folder(ablation, tmp_path, monkeypatch, place, nothing):
    monkeypatch.setattr(module, "train", nothing)
    folder = tmp_path / "run" / place
    if place != ".":
        open_run(tmp_path / "run", ablation)
    shutil.copytree(shipped.run_folder("reader"), folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SpecError, match=r"holds a shipped model .* with init_from="):
        run(ablation, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def of_named_models(stopped, ablation):
    """The ablation on an arm that another ablation trained, by its folder."""
    arms = (Arm(name="there", model=str(stopped[0] / "one")),)
    return dataclasses.replace(ablation, base=None, arms=arms)


def test_an_arm_may_be_a_model_that_is_there(stopped, of_named_models, tmp_path, monkeypatch):
    """Its rows are those of the ablation that trained it; only the fine-tuning is done again."""
    trained = []
    monkeypatch.setattr(module, "train", lambda experiment, folder: trained.append(folder) or train(experiment, folder))
    before = sorted(path.stat().st_mtime_ns for path in (stopped[0] / "one").rglob("*"))
    rows = run(of_named_models, tmp_path, say=lambda _: None)
    assert trained == [tmp_path / "there" / "fine-tuned-interpolation-x1"]
    assert sorted(path.stat().st_mtime_ns for path in (stopped[0] / "one").rglob("*")) == before
    keep = lambda row: {name: value for name, value in row.items() if name not in ("arm", "config", "seconds")}
    assert [keep(row) for row in rows] == [keep(row) for row in stopped[1] if row["arm"] == "one"]


def test_a_named_model_is_checked_before_anything_is_done(of_named_models, finished, tmp_path, monkeypatch, nothing):
    for name in ("train", "append_rows"):
        monkeypatch.setattr(module, name, nothing)
    wrong = lambda **fields: dataclasses.replace(of_named_models, arms=(Arm(name="there", **fields),))
    trained, run_dir = str(finished / "one"), tmp_path / "new"
    for fields, message in (
        ({"model": "redaer"}, "model 'redaer': no such run folder, nor a shipped model (copier, reader, reader_2k)"),
        ({"model": str(finished)}, "expected the folder of a training run; its config is of type Ablation"),
        ({"model": trained, "edits": (("steps", 9),)}, "Arm.edits change steps"),
        ({"model": trained, "edits": (("model.width", 64),)}, "parameter"),
    ):
        with pytest.raises(SpecError, match=re.escape(message)):
            run(wrong(**fields), run_dir)
    shutil.rmtree(finished / "one" / "checkpoints")
    with pytest.raises(SpecError, match="no checkpoint"):
        run(wrong(model=trained), run_dir)
    assert not run_dir.exists()


def use_other_rope(folder):
    config = read_config(folder)
    shutil.rmtree(folder / "config.json", ignore_errors=True)
    (folder / "config.json").write_text(dumps(edit(config, "model.rope", LinearInterpolation(factor=8.0))))


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda folder: retrain(read_config(folder), folder), "parameters"),
        (use_other_rope, "experiment"),
    ],
)
@pytest.mark.parametrize(
    "variants",
    [pytest.param(slice(0, 1), id="zero-shot", marks=pytest.mark.slow), pytest.param(slice(2, 3), id="fine-tuned")],
)
def test_a_named_model_stays_what_it_was(of_named_models, finished, tmp_path, monkeypatch, change, found, variants, nothing):
    """Also where no row of its own parameters is there to compare with, and between two variants of one start."""
    arms = (Arm(name="there", model=str(finished / "one")),)
    ablation = dataclasses.replace(of_named_models, arms=arms, variants=of_named_models.variants[variants])
    message = f"ablation, there: .*{found} of model .* changed since the first start"
    append = module.append_rows

    def changing(path, rows):
        append(path, rows)
        change(finished / "one")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "append_rows", changing)
    with pytest.raises(KeyboardInterrupt):
        run(ablation, tmp_path / "new", say=lambda _: None)
    monkeypatch.setattr(module, "append_rows", nothing)
    with pytest.raises(SpecError, match=message):
        run(ablation, tmp_path / "new")


def test_a_model_of_many_devices_is_measured_on_one(of_named_models, finished, tmp_path, monkeypatch):
    """As it is by `evaluate`: nothing is trained, so neither its mesh nor its data are asked for."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    config = edits(read_config(finished / "one"), [("mesh.data", 2), ("data.mixture[0].rows.source.path", "gone")])
    (finished / "one" / "config.json").write_text(dumps(config))
    arms = (Arm(name="there", model=str(finished / "one")),)
    ablation = dataclasses.replace(of_named_models, arms=arms, variants=of_named_models.variants[:1])
    open_run(tmp_path / "new", ablation)
    monkeypatch.setattr(ablate.jax, "device_count", lambda: 1)
    assert program.run(ablate.main, [f"--run_dir={tmp_path / 'new'}"]) == 0
