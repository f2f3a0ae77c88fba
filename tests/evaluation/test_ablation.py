"""An ablation trains once an arm, measures every variant once, and goes on where it was stopped."""

import pytest

from configs.models import byte
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Records
from lcx.data.sources import TextFolder
from lcx.evaluation import ablation as module
from lcx.evaluation.ablation import Ablation, Arm, Panel, Variant, run
from lcx.evaluation.report import read_rows
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.positions.linear import LinearInterpolation
from lcx.positions.rope import Rope
from lcx.spec import SpecError, edit
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant


@pytest.fixture
def ablation(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words over and over again. " * 40)
    source = TextFolder(path=str(tmp_path / "text"))
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
            Variant(method="interpolation", lengths=(16, 32), edits=far),
            Variant(method="interpolation", stage="fine-tuned", lengths=(32,), edits=far, finetune=(("data.length", 32),)),
        ),
        tasks=(
            Perplexity(source=source, windows=2, buckets=2),
            Retrieval(name="records", generator=Records(), examples_each=2),
        ),
        panels=(Panel(title="text", task="text", metric="nll", where=(("bucket", "all"),)),),
    )


def test_stopped_ablation_goes_on(ablation, tmp_path, monkeypatch):
    trained, measured = [], []
    train, measure = module.train, module.append_rows

    def counted_train(experiment, folder):
        trained.append(folder.name)
        return train(experiment, folder)

    def stopping(path, rows):
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append((rows[0]["arm"], rows[0]["variant"], rows[0]["task"], rows[0]["length"]))
        measure(path, rows)

    monkeypatch.setattr(module, "train", counted_train)
    monkeypatch.setattr(module, "append_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(ablation, tmp_path / "run", say=lambda _: None)
    monkeypatch.setattr(module, "append_rows", lambda path, rows: (measured.append(rows[0]["task"]), measure(path, rows)))
    rows = run(ablation, tmp_path / "run", say=lambda _: None)
    assert trained == ["one", "fine-tuned-interpolation-x1", "two", "fine-tuned-interpolation-x1"]
    keys = [(r["arm"], r["variant"], r["task"], r["metric"], r["length"], r.get("bucket")) for r in rows]
    assert len(keys) == len(set(keys)) == 2 * 5 * (4 + 3)
    assert rows == read_rows(tmp_path / "run" / "results.jsonl")
    text = (tmp_path / "run" / "table.md").read_text()
    assert text.count("| interpolation |") == 4 and (tmp_path / "run" / "two.png").exists()
    monkeypatch.setattr(module, "append_rows", stopping)
    assert run(ablation, tmp_path / "run", say=lambda _: None) == rows
    with pytest.raises(SpecError, match="holds rows of config"):
        run(edit(ablation, "base.seed", 5), tmp_path / "run", say=lambda _: None)


def test_impossible_ablations_are_refused(ablation):
    with pytest.raises(SpecError, match=r"ablation, one, zero-shot none x1: .*Decoder has no field 'ropes'"):
        edit(ablation, "variants[0].edits", (("model.ropes", Rope()),))
    with pytest.raises(SpecError, match=r"Panel\.task = 'txt': expected one of text, records"):
        edit(ablation, "panels[0].task", "txt")
    with pytest.raises(SpecError, match="distinct names"):
        edit(ablation, "arms", (Arm(name="one"), Arm(name="one")))
