"""An ablation trains once an arm, measures every variant once, and goes on where it was stopped."""

import re
import signal

import jaxtyping
import pytest

from experiments import ablate, program
from lcx.config import dumps
from lcx.data.recall import Records, TaskDoesNotFit
from lcx.data.tokenizers import ByteTokenizer
from lcx.evaluation import ablation as module
from lcx.evaluation.ablation import Arm, Variant, run
from lcx.evaluation.report import read_rows
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.inference.language_model import LocalModel
from lcx.positions.rope import Rope
from lcx.spec import SpecError, edit, edits
from lcx.training import loop
from lcx.training.checkpoint import latest, load_model
from lcx.training.run_folder import open_run, read_config

CELLS = [("none", 16), ("none", 32), ("interpolation", 32), ("interpolation", 32)]  # of each arm and task


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


def test_a_finished_ablation_is_left_alone(ablation, finished, monkeypatch, nothing):
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
    *blocks, in_use, positions = [block.splitlines() for block in capsys.readouterr().out.split("\n\n")[1:]]
    assert in_use[0] == "state of a row, forward pass:" and [line.partition(":")[0] for line in in_use[1:]] == ["one", "two"]
    assert positions[0] == "positions, at the longest length of each variant"
    shown = "16 pairs, wavelengths 12.57 to 7.067e+04 tokens, 2 turn within 32; trained window 16"
    rope = lambda stage: f"{stage} interpolation x1, rope, LinearInterpolation: {shown}"
    reach = "critical dimension 4, effective window 32; logits x 1 at the end"
    assert positions[1:] == [f"{rope('zero-shot')}: {reach}", f"{rope('fine-tuned')}, distances to 32: {reach}"]
    assert [block[0] for block in blocks] == [
        "one",
        "one, fine-tuned interpolation x1",
        "two",
        "two, fine-tuned interpolation x1",
    ]
    counts = [int(block[1].removeprefix("parameters").replace(",", "")) for block in blocks]
    assert counts[0] == counts[1] == counts[2] + 4 * 32 and counts[2] == counts[3]
    assert all(any(line.startswith("training FLOPs of the run") for line in block) for block in blocks)


def test_panels_may_change_without_another_measurement(ablation, finished, monkeypatch, nothing):
    for name in ("train", "append_rows"):
        monkeypatch.setattr(module, name, nothing)
    with pytest.raises(SpecError, match=r"Panel.where = .*'al'.*: expected values of some row; there are .*'last half'"):
        run(edit(ablation, "panels[0].where", (("bucket", "al"),)), finished)
    with pytest.raises(SpecError, match=r"Panel.where = \(\): expected a value for bucket too: several rows share a cell"):
        run(edit(ablation, "panels[0].where", ()), finished)
    run(edit(ablation, "panels[0].title", "words"), finished)
    assert "### one: words" in (finished / "table.md").read_text()


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


def test_a_variant_that_cannot_be_measured_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    config = '--config=config:ablations.positions.zero_shot(only="dynamic YaRN")'
    rotated = '--config=set:variants[1].edits=(("model.rope", DynamicYaRN(original_length=128)),)'
    assert program.run(ablate.main, [config, rotated, f"--run_dir={tmp_path}", "--dry_run"]) == 2
    assert "copier, zero-shot dynamic YaRN x4: model.pattern[0].mixer.cache.keys" in capsys.readouterr().err
