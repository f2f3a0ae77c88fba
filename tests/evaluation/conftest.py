"""An ablation of two tiny arms, stopped and run again, once for all tests of ablations."""

import shutil

import pytest

from configs.models import byte
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Records
from lcx.data.sources import TextFolder
from lcx.evaluation import ablation as module
from lcx.evaluation.ablation import Ablation, Arm, Variant, run
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.positions.linear import LinearInterpolation
from lcx.positions.rope import Rope
from lcx.spec import edit
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture
def nothing():
    """What is called only where training or measuring is not to be."""

    def fail(*_):
        pytest.fail("trained or measured again")

    return fail
