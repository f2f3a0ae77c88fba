"""An ablation trains once an arm, measures every variant once, and goes on where it was stopped."""

import dataclasses
import re
import shutil
import signal

import jaxtyping
import pytest

from configs.models import byte
from experiments import ablate, program
from lcx.config import dumps
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Records, TaskDoesNotFit
from lcx.data.sources import TextFolder
from lcx.data.tokenizers import ByteTokenizer
from lcx.evaluation import ablation as module
from lcx.evaluation.ablation import Ablation, Arm, Variant, run
from lcx.evaluation.panels import Panel
from lcx.evaluation.report import read_rows
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.inference.language_model import LocalModel
from lcx.positions.linear import LinearInterpolation
from lcx.positions.rope import Rope
from lcx.spec import SpecError, edit, edits
from lcx.training import loop, shipped
from lcx.training.checkpoint import latest, load_model
from lcx.training.experiment import Experiment
from lcx.training.loop import train
from lcx.training.optimizer import AdamW
from lcx.training.run_folder import open_run, read_config
from lcx.training.schedules import Constant


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("some words over and over again. " * 40)
    source = TextFolder(path=str(folder))
    base = Experiment(
        model=edit(byte.toy(width=32, layers=1), "pattern[0].channel.hidden", 16),
        data=Pipeline(mixture=(Weighted(rows=PackedText(source=source)),), length=16, batch_size=2),
        optimizer=AdamW(learning_rate=Constant(peak=1e-3)),
        steps=2,
    )
    far = (("model.rope", LinearInterpolation(factor=2.0)),)
    return Ablation(
        base=base,
        arms=(Arm(name="one"), Arm(name="two", edits=(("model.embed_mixer", None),))),
        variants=(
            Variant(method="none", lengths=(16, 32), edits=(("model.rope", Rope()),)),
            Variant(method="interpolation", lengths=(32,), edits=far),
            Variant(method="interpolation", stage="fine-tuned", lengths=(32,), edits=far, finetune=(("data.length", 32),)),
        ),
        tasks=(
            Perplexity(source=source, windows=2, buckets=2),
            Retrieval(name="records", generator=Records(), examples_each=2),
        ),
        panels=(Panel(title="text", task="text", metric="nll", where=(("bucket", "all"),)),),
    )


CELLS = [("none", 16), ("none", 32), ("interpolation", 32), ("interpolation", 32)]  # of each arm and task


@pytest.fixture(scope="module")
def stopped(ablation, tmp_path_factory):
    """An ablation stopped after five measurements and run again: (folder, rows, arms and variants trained, what it said)."""
    folder, trained, said = tmp_path_factory.mktemp("run"), [], []
    train, append, written = module.train, module.append_rows, []

    def counted_train(experiment, run_dir):
        trained.append(run_dir.name)
        return train(experiment, run_dir)

    def stopping(path, rows):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(rows)
        append(path, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", counted_train)
        patch.setattr(module, "append_rows", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(ablation, folder, say=lambda _: None)
        patch.setattr(module, "append_rows", append)
        rows = run(ablation, folder, say=said.append)
    return folder, rows, trained, said


@pytest.fixture
def finished(stopped, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(stopped[0], tmp_path / "run")


def nothing(*_):
    pytest.fail("trained or measured again")


def test_a_stopped_ablation_goes_on(stopped):
    folder, rows, trained, _ = stopped
    assert trained == ["one", "fine-tuned-interpolation-x1", "two", "fine-tuned-interpolation-x1"]
    keys = [(r["arm"], r["variant"], r["task"], r["metric"], r["length"], r.get("bucket")) for r in rows]
    assert len(keys) == len(set(keys)) == 2 * len(CELLS) * (4 + 3)
    assert rows == read_rows(folder / "results.jsonl")
    for arm in ("one", "two"):
        assert [(r["method"], r["length"]) for r in rows if (r["arm"], r.get("bucket")) == (arm, "all")] == CELLS
    text = (folder / "table.md").read_text()
    assert text.count("| interpolation |") == 4 and text.count("### one: text") == text.count("### two: text") == 1
    assert text.count("zero-shot, by length in tokens; mean and bootstrap 95 % interval over 2 examples") == 2
    assert (folder / "one.png").exists() and (folder / "two.png").exists()


def test_variants_read_the_same_parameters(stopped):
    """A zero-shot variant is the arm under another rope; at one length the same rope gives the same numbers."""
    folder, rows, _, _ = stopped
    trained = load_model(folder / "one", read_config(folder / "one").model)
    task = Retrieval(name="records", generator=Records(), examples_each=2)
    wanted = task.measure(LocalModel(trained, ByteTokenizer(), window=32), 32)
    held = [
        r["value"]
        for r in rows
        if (r["arm"], r["variant"], r["task"], r["length"]) == ("one", "zero-shot none x1", "records", 32)
    ]
    assert held == [row["value"] for row in wanted]
    by_stage = {
        r["stage"]: r["value"] for r in rows if (r["arm"], r["method"], r.get("bucket")) == ("one", "interpolation", "all")
    }
    assert by_stage["zero-shot"] != by_stage["fine-tuned"]


def test_the_time_split_names_every_arm_over_all_starts(stopped, ablation, finished):
    split = [line for line in stopped[3] if re.match(r"(one|two): [\d.]+ s: ", line)]
    assert [line.partition(":")[0] for line in split] == ["one", "two"]
    assert all(f"{kind} " in line for line in split for kind in ("train", "fine-tune", "evaluate", "compile"))
    said = []
    run(ablation, finished, say=said.append)
    assert said == split


def test_a_finished_ablation_is_left_alone(ablation, finished, monkeypatch):
    for name in ("train", "append_rows"):
        monkeypatch.setattr(module, name, nothing)
    said, rows = [], read_rows(finished / "results.jsonl")
    assert run(ablation, finished, say=said.append) == rows
    with pytest.raises(SpecError, match=r"they differ first in base\.seed: 0 against 5; give another --run_dir"):
        run(edit(ablation, "base.seed", 5), finished)
    config = finished / "config.json"
    config.write_text(dumps(edit(ablation, "base.seed", 5)))
    with pytest.raises(SpecError, match=r"holds rows of config .*: give another --run_dir"):
        run(edit(ablation, "base.seed", 5), finished)


@pytest.mark.parametrize("trained", ["one", "one/fine-tuned-interpolation-x1"])
def test_rows_of_other_parameters_are_refused(ablation, finished, trained, monkeypatch):
    """The same config may have been trained again by another version."""
    monkeypatch.setattr(module, "append_rows", nothing)
    retrain(read_config(finished / trained), finished / trained)
    with pytest.raises(SpecError, match=rf"rows of parameters \w+ of .*/{trained}, which now holds \w+: .*another --run_dir"):
        run(ablation, finished)


def test_parameters_trained_again_are_compared_with_the_rows(ablation, finished, monkeypatch):
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


def test_a_training_told_to_stop_goes_on(ablation, tmp_path, monkeypatch, capsys):
    class Stopping(loop._Stop):
        def requested(self, step):
            signal.raise_signal(signal.SIGTERM)
            return super().requested(step)

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    open_run(tmp_path, ablation)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_Stop", Stopping)
        assert program.run(ablate.main, [f"--run_dir={tmp_path}"]) == 143
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == f"ablate: {tmp_path}/one: saved at step 1; start again to go on" and "Traceback" not in err
    starts = []

    def start(_, folder):
        starts.append(latest(folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", start)
    with pytest.raises(KeyboardInterrupt):
        program.run(ablate.main, [f"--run_dir={tmp_path}"])
    assert starts == [1]


def test_a_dry_run_shows_what_every_training_costs(ablation, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    open_run(tmp_path, ablation)
    assert program.run(ablate.main, [f"--run_dir={tmp_path}", "--dry_run"]) == 0
    blocks = [block.splitlines() for block in capsys.readouterr().out.split("\n\n")[1:]]
    assert [block[0] for block in blocks] == [
        "one",
        "one, fine-tuned interpolation x1",
        "two",
        "two, fine-tuned interpolation x1",
    ]
    counts = [int(block[1].removeprefix("parameters").replace(",", "")) for block in blocks]
    assert counts[0] == counts[1] == counts[2] + 4 * 32 and counts[2] == counts[3]
    assert all(any(line.startswith("training FLOPs of the run") for line in block) for block in blocks)


def test_panels_may_change_without_another_measurement(ablation, finished, monkeypatch):
    for name in ("train", "append_rows"):
        monkeypatch.setattr(module, name, nothing)
    with pytest.raises(SpecError, match=r"Panel.where = .*'al'.*: expected values of some row; there are .*'last half'"):
        run(edit(ablation, "panels[0].where", (("bucket", "al"),)), finished)
    with pytest.raises(SpecError, match=r"Panel.where = \(\): expected a value for bucket too: several rows share a cell"):
        run(edit(ablation, "panels[0].where", ()), finished)
    run(edit(ablation, "panels[0].title", "words"), finished)
    assert "### one: words" in (finished / "table.md").read_text()


def test_a_stopped_training_is_not_taken_for_another_one(ablation, tmp_path, monkeypatch):
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
def test_a_shipped_model_is_not_trained_on_in_its_folder(ablation, tmp_path, monkeypatch, place):
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


def test_a_named_model_is_checked_before_anything_is_done(of_named_models, finished, tmp_path, monkeypatch):
    for name in ("train", "append_rows"):
        monkeypatch.setattr(module, name, nothing)
    wrong = lambda **fields: dataclasses.replace(of_named_models, arms=(Arm(name="there", **fields),))
    trained, run_dir = str(finished / "one"), tmp_path / "new"
    for fields, message in (
        ({"model": "redaer"}, "model 'redaer': no such run folder, nor a shipped model (copier, reader)"),
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
@pytest.mark.parametrize("variants", [slice(0, 1), slice(2, 3)], ids=["zero-shot", "fine-tuned"])
def test_a_named_model_stays_what_it_was(of_named_models, finished, tmp_path, monkeypatch, change, found, variants):
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


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ([("tasks[0].windows", 500)], SpecError, "Perplexity.windows = 500: expected at most what the source has"),
        ([("tasks[1].generator.pairs", 9)], TaskDoesNotFit, "length = 16: expected at least 90 tokens"),
        (
            [("variants[1].edits", (("model.width", 64),))],
            SpecError,
            "ablation, one, zero-shot interpolation x1: other parameters than the arm's",
        ),
    ],
)
def test_what_cannot_be_measured_is_found_before_training(ablation, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(error, match=message):
        run(edits(ablation, changes), tmp_path / "run", say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_impossible_ablations_are_refused(ablation):
    with pytest.raises(SpecError, match=r"ablation, one, zero-shot none x1: .*Decoder has no field 'ropes'"):
        edit(ablation, "variants[0].edits", (("model.ropes", Rope()),))
    with pytest.raises(
        SpecError, match=r"one, zero-shot none x1: Variant.edits change seed: 3 against 0: expected edits of the"
    ):
        edit(ablation, "variants[0].edits", (("seed", 3),))
    with pytest.raises(SpecError, match=r"one, zero-shot none x1: an edit of model.rope changes nothing: expected a layer"):
        edit(ablation, "base.model.pattern[0].mixer.rope", "none")
    with pytest.raises(SpecError, match=r"Panel\.task = 'txt': expected one of text, records"):
        edit(ablation, "panels[0].task", "txt")
    with pytest.raises(SpecError, match=r"Panel\.metric = 'exact': expected one of nll"):
        edit(ablation, "panels[0].metric", "exact")
    with pytest.raises(SpecError, match=r"Ablation\.base = None: expected an Experiment for 'one' to train"):
        edit(ablation, "base", None)
    with pytest.raises(SpecError, match=r"Ablation\.base = .*: expected None: every arm names its model"):
        edit(ablation, "arms", (Arm(name="one", model="reader"),))
    with pytest.raises(SpecError, match="distinct names"):
        edit(ablation, "arms", (Arm(name="one"), Arm(name="one")))
    with pytest.raises(SpecError, match="names that can be files"):
        edit(ablation, "arms", (Arm(name="../one"),))
    with pytest.raises(
        SpecError, match=r"variants = \('zero-shot', 'none', 32\): expected stage, method and length to name one"
    ):
        edit(ablation, "variants", (*ablation.variants, Variant(method="none", scale=2.0, lengths=(32, 64))))
    with pytest.raises(SpecError, match=r"Variant.lengths = \(16, 16\): expected distinct lengths"):
        Variant(method="none", lengths=(16, 16))
