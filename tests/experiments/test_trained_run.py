"""A run is trained, continued, evaluated and read from by the programs, with the folder as their only link."""

import io
import json
import shutil
from pathlib import Path

import jax
import pytest
from flax import nnx

from experiments import convert, evaluate, generate, train
from experiments.program import run
from lcx.data.sources import TextFolder
from lcx.evaluation.checks import digest
from lcx.evaluation.report import read_rows
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.inference.generate import generate as batched
from lcx.inference.language_model import LocalModel
from lcx.spec import edit, fingerprint
from lcx.training import loop
from lcx.training.checkpoint import load_model
from lcx.training.run_folder import read_config

STEPS = 3
PERPLEXITY = "Perplexity(source=TextFolder(path='{}'), windows={}, buckets=2)"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(3):
        (folder / f"{n}.txt").write_text(f"number {n} of the documents, in which the sentence comes again. " * 20)
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "a"
    argv = [
        f"--config=config:recipes.quick_text.quick(width=32, length=32, steps={STEPS})",
        f"--config=set:data.mixture[0].rows.source=TextFolder(path='{text}')",
        "--config=set:optimizer.learning_rate=Constant(peak=1e-2)",
        f"--run_dir={run_dir}",
    ]
    assert run(train.main, argv) == 0
    return run_dir


def evaluation(trained, text, run_dir, *more):
    tasks = f"({PERPLEXITY.format(text, 3)},)"
    return [
        f"--config=config:recipes.quick_text.evaluate(model='{trained}')",
        f"--config=set:tasks={tasks}",
        "--config=set:lengths=(16, 64)",
        *more,
        f"--run_dir={run_dir}",
    ]


def test_a_complete_run_is_not_trained_again(trained, capsys):
    before = (trained / "metrics.jsonl").read_bytes()
    assert run(train.main, [f"--run_dir={trained}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["run_dir"], printed["status"], printed["step"]) == (str(trained), "completed", 3)
    assert (trained / "metrics.jsonl").read_bytes() == before
    assert len((trained / "starts.jsonl").read_text().splitlines()) == 2


def test_generation_streams_what_the_model_says(trained, capsys):
    assert run(generate.main, [f"--run_dir={trained}", "--prompt=number", "--max_new=8"]) == 0
    experiment = read_config(trained)
    tokenizer = experiment.data.tokenizer
    model = load_model(trained, experiment.model)
    ids = batched(model, [tokenizer.encode("number").tolist()], max_new=8, stop=(tokenizer.eos,))[0].ids
    assert capsys.readouterr().out == f"number{tokenizer.decode(ids)}\n"


def test_what_is_logged_stands_above_the_text(trained, capsys, monkeypatch):
    def talking(*_, **__):
        print("logged")
        yield from b"ab"

    monkeypatch.setattr(generate, "stream", talking)
    assert run(generate.main, [f"--run_dir={trained}", "--prompt=number "]) == 0
    assert capsys.readouterr().out == "logged\nnumber ab\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt="], "--prompt is empty"),
        (["--prompt=a", "--step=7"], f"no checkpoint of step 7; there are [{STEPS}]"),
        (["--prompt=a", "--top_k=3"], "Sampling.temperature = 0.0: expected positive where top_k, top_p or min_p is set"),
        (["--prompt=a", "--max_new=0"], "--max_new=0: expected a positive integer"),
        (["--prompt=a", "--max_new=abc"], "--max_new=abc: expected a positive integer"),
    ],
)
def test_what_cannot_be_generated_is_told_in_one_line(trained, argv, message, capsys):
    assert run(generate.main, [f"--run_dir={trained}", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("main", [generate.main, convert.main, evaluate.main])
def test_a_folder_without_a_model_is_told_what_is_wanted(main, text, tmp_path, capsys):
    of_model = {
        evaluate.main: evaluation(text, text, tmp_path / "e"),
        generate.main: [f"--run_dir={text}", "--prompt=a"],
        convert.main: [f"--run_dir={text}", f"--to={tmp_path}/to"],
    }
    assert run(main, of_model[main]) == 2
    kinds = "a training run, a checkpoint of transformers, or a shipped model (copier, reader, reader_2k)"
    wanted = f"the folder holds no config.json: expected the folder of {kinds}"
    assert f"model {str(text)!r}: {wanted}\n" in capsys.readouterr().err


def test_the_step_of_a_shipped_model_is_named(capsys):
    assert run(generate.main, ["--run_dir=reader", "--prompt=a", "--step=7"]) == 2
    assert "reader: no checkpoint of step 7; there are [3300]" in capsys.readouterr().err


def test_convert_takes_a_run_or_a_shipped_model_and_overwrites_nothing(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "curve", lambda path, _: Path(path).touch())
    assert run(convert.main, [f"--run_dir={trained}", f"--to={tmp_path}/out"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before.keys() == {"config.json", "config.txt", "weights.npz", "metrics.jsonl", "curve.png"}
    capsys.readouterr()
    for target in ("out", "out/config.txt"):
        assert run(convert.main, [f"--run_dir={trained}", f"--to={tmp_path}/{target}"]) == 2
        assert "exists already: expected a new folder" in capsys.readouterr().err
    assert run(convert.main, [f"--run_dir={trained}", f"--to={tmp_path}/out/config.txt/a"]) == 2
    assert "cannot be made: Not a directory" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert run(convert.main, ["--run_dir=reader", f"--to={tmp_path}/reader", "--dry_run"]) == 0
    assert "at step 3300 to" in capsys.readouterr().out


def test_the_prompt_may_come_from_standard_input(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("number"))
    assert run(generate.main, [f"--run_dir={trained}", "--max_new=1"]) == 0
    assert capsys.readouterr().out.startswith("number")


def test_evaluation_measures_the_checkpoint_once(trained, text, tmp_path, capsys):
    argv = evaluation(trained, text, tmp_path / "e")
    assert run(evaluate.main, argv) == 0
    rows = read_rows(tmp_path / "e" / "results.jsonl")
    task = Perplexity(source=TextFolder(path=str(text)), windows=3, buckets=2)
    experiment = read_config(trained)
    model = load_model(trained, experiment.model)
    wanted = [row for n in (16, 64) for row in task.measure(LocalModel(model, experiment.data.tokenizer, window=n), n)]
    label = {"model": str(trained), "step": STEPS, "experiment": fingerprint(experiment), "parameters": digest(model)}
    assert rows == [label | row for row in wanted]
    assert "| bucket last half |" in capsys.readouterr().out
    assert run(evaluate.main, argv) == 0
    assert read_rows(tmp_path / "e" / "results.jsonl") == rows


@pytest.mark.parametrize("changed", ["experiment", "parameters"])
def test_a_model_trained_again_does_not_give_the_old_numbers(trained, text, tmp_path, changed, capsys):
    """Another config to the same step, and the same config to other parameters."""
    model = shutil.copytree(trained, tmp_path / "model")
    argv = evaluation(model, text, tmp_path / "e")
    assert run(evaluate.main, argv) == 0
    shutil.rmtree(model)
    loop.train(edit(read_config(trained), "seed", 1), model)
    if changed == "parameters":
        shutil.copyfile(trained / "config.json", model / "config.json")
    before = (tmp_path / "e" / "results.jsonl").read_bytes()
    capsys.readouterr()
    assert run(evaluate.main, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f" with {changed} " in err and "give another --run_dir" in err
    assert (tmp_path / "e" / "results.jsonl").read_bytes() == before


def test_a_refused_evaluation_leaves_nothing_behind(trained, text, tmp_path, capsys):
    argv = evaluation(trained, text, tmp_path / "e")
    tasks = f"(Retrieval(name='needle', generator=Needles(), examples_each=1), {PERPLEXITY.format(text, 50)})"
    assert run(evaluate.main, [*argv, f"--config=set:tasks={tasks}", "--config=set:lengths=(40, 8)"]) == 2
    assert "Needles: length = 8: expected at least 34 tokens" in capsys.readouterr().err
    assert run(evaluate.main, [*argv, f"--config=set:tasks={tasks}", "--config=set:lengths=(40, 1000)"]) == 2
    assert "Perplexity.windows = 50: expected at most what the source has" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    assert run(evaluate.main, argv) == 0


def test_dry_runs_show_what_the_model_costs(trained, text, tmp_path, capsys):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(load_model(trained, read_config(trained).model))))
    for main, argv in ((evaluate.main, evaluation(trained, text, tmp_path / "e")), (generate.main, [f"--run_dir={trained}"])):
        assert run(main, [*argv, "--dry_run"]) == 0
        out = capsys.readouterr().out
        assert f"{'parameters':<48} {parameters:,}\n" in out and f"{'parameter bytes':<48} {4 * parameters:,}\n" in out
        assert "forward FLOPs a row of 64, all pairs" in out or main is generate.main
    assert not (tmp_path / "e").exists()


def test_evaluation_goes_on_where_it_was_cut(trained, text, tmp_path):
    argv = evaluation(trained, text, tmp_path)
    assert run(evaluate.main, argv) == 0
    results = tmp_path / "results.jsonl"
    whole = results.read_text()
    results.write_text("".join(line for line in whole.splitlines(keepends=True) if '"length": 16,' in line))
    assert run(evaluate.main, argv) == 0
    assert results.read_text() == whole


def test_an_edit_reads_the_parameters_with_another_rope(trained, text, tmp_path):
    edit = '--config=set:edits=(("model.rope", LinearInterpolation(factor=4.0)),)'
    assert run(evaluate.main, evaluation(trained, text, tmp_path / "plain")) == 0
    assert run(evaluate.main, evaluation(trained, text, tmp_path / "edited", edit)) == 0
    plain, edited = (read_rows(tmp_path / name / "results.jsonl") for name in ("plain", "edited"))
    assert [row["value"] for row in plain] != [row["value"] for row in edited]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (['--config=set:edits=(("model.rop", None),)'], "Decoder has no field 'rop'"),
        (['--config=set:edits=(("model.width", 64),)'], "expected edits that keep its parameters"),
        (["--config=set:step=2"], f"no checkpoint of step 2; there are [{STEPS}]"),
        (['--config=set:edits=(("data.length", 4096),)'], "Evaluation.edits change data.length: 4096 against 32"),
        (['--config=set:edits=(("objective.z_loss", 1.0),)'], "Evaluation.edits change objective.z_loss: 1.0 against"),
        (
            ['--config=set:edits=(("model.pattern[0].mixer.rope", "none"), ("model.rope", Rope(base=9.0)))'],
            "an edit of model.rope changes nothing",
        ),
        (["--config=set:lengths=()"], "Evaluation.lengths = (): expected distinct lengths"),
        (["--config=set:lengths=(16, 16)"], "Evaluation.lengths = (16, 16): expected distinct lengths"),
        (["--config=set:tasks[0].name=p/q"], "expected names that can be files"),
        (["--config=set:model=nowhere"], "model 'nowhere': no such run folder, nor a shipped model"),
        (["--config=set:tasks[0].source.path=nowhere"], "TextFolder.path = 'nowhere': there is no such folder"),
        (["--config=set:tasks[0].windows=5000"], "Perplexity.windows = 5000: expected at most what the source has"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_line(trained, text, tmp_path, more, message, capsys):
    assert run(evaluate.main, evaluation(trained, text, tmp_path / "e", *more)) == 2
    assert not (tmp_path / "e").exists()
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
