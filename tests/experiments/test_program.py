"""A command line that cannot work is one line on stderr and exit status 2, before anything is compiled."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxtyping
import pytest

from configs.ablations import rope_extension
from configs.recipes import quick_text
from experiments import ablate, bench, evaluate, train
from experiments.program import config_names, run
from lcx.attention.mask import Window
from lcx.spec import edit, edits
from lcx.training.metrics import TrainingDiverged
from lcx.training.run_folder import open_run, read_config

ROOT = Path(__file__).parents[2]
QUICK = "--config=config:recipes.quick_text.quick"


@pytest.fixture(autouse=True)
def _as_in_a_program(monkeypatch):
    """No import hook checks types before the specs do, and nothing compiles."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))


def sets(*assignments):
    return [QUICK, *(f"--config=set:{assignment}" for assignment in assignments)]


WRONG = {
    "no config": ([], "--config is missing"),
    "misspelt config": (["--config=config:recipes.quick_text.quik"], "Did you mean recipes.quick_text.quick"),
    "a module is no config": (["--config=config:recipes.quick_text"], "configs has no function 'recipes.quick_text'"),
    "an imported name is no config": (["--config=config:models.byte.Layer"], "configs has no function"),
    "nothing outside configs": (["--config=config:os.system('true')"], "configs has no function 'os.system'"),
    "misspelt argument": (["--config=config:models.byte.toy(widht=3)"], "unexpected keyword argument 'widht'"),
    "argument of a wrong type": (["--config=config:models.byte.toy(width='a')"], "width = 'a': expected int"),
    "argument that is no literal": (["--config=config:models.byte.toy(width=a)"], "expected literals"),
    "another kind of config": (["--config=config:models.byte.toy"], "of type Decoder: this program takes Experiment"),
    "no directive": (["--config=quick"], "expected config:<name> or config_file:<path> before it"),
    "forgotten directive": (
        ["--config=recipes.quick_text.quick(steps=3)"],
        "did you mean --config=config:recipes.quick_text.quick(steps=3)?",
    ),
    "unknown directive": ([QUICK, "--config=sett:steps=1"], "expected config:, config_file:, set:<path>=<value> or fiddler:"),
    "set before config": (["--config=set:steps=1", QUICK], "comes first"),
    "set without a config or a run": (["--config=set:steps=1"], "comes first: expected config:<name> or config_file:<path>"),
    "set over a folder that is no run": (["--config=set:steps=1", "--run_dir=nowhere"], "nowhere: no config.json"),
    "two configs": ([QUICK, QUICK], "is a second base config"),
    "missing file": (["--config=config_file:nowhere.json"], "nowhere.json: there is no such file"),
    "fiddler that does not fit": (
        ["--config=config:models.byte.toy", "--config=fiddler:edits.windowed(64)"],
        "fiddler:edits.windowed(64): does not fit this config of type Decoder: ",
    ),
    "config as a fiddler": (
        [QUICK, "--config=fiddler:recipes.quick_text.quick"],
        "'recipes.quick_text.quick' is a config: expected a function that edits one",
    ),
    "another file": (["--config=config_file:pyproject.toml"], "pyproject.toml: not a config of this version"),
    "missing run": (["--run_dir=nowhere"], "nowhere: no config.json"),
    "misspelt fiddler": ([QUICK, "--config=fiddler:longer"], "configs has no function 'longer'"),
    "wrong argument of a fiddler": ([QUICK, "--config=fiddler:edits.windowed('a')"], "size = 'a': expected int"),
    "missing argument of a fiddler": ([QUICK, "--config=fiddler:edits.windowed"], "missing a required argument: 'size'"),
    "impossible value from a fiddler": (
        [QUICK, "--config=fiddler:edits.windowed(0)"],
        "Window.size = 0: expected at least 1",
    ),
    "misspelt field": (sets("stepz=3"), "Experiment has no field 'stepz'. Did you mean steps?"),
    "misspelt deep field": (sets("model.pattern[0].mixer.haeds=3"), "Attention has no field 'haeds'. Did you mean heads"),
    "no value": (sets("steps"), "expected config:, config_file:, set:<path>=<value>"),
    "wrong type": (sets("steps=many"), "Experiment.steps = 'many': expected int"),
    "wrong type, deep": (sets("data.length=256.0"), "data: Pipeline.length = 256.0: expected int"),
    "wrong part": (sets("model.rope=Causal()"), "model: Decoder.rope = Causal(): expected FrequencyRule or None"),
    "part of another field": (sets("model.rope=ALiBi()"), "ALiBi is a LinearBias, for model.pattern[0].mixer.distance_bias"),
    "two things wrong": (
        sets("model.rope=YaRN()"),
        "model.rope: YaRN.factor is missing: expected float; YaRN.original_length is missing: expected int",
    ),
    "misspelt part": (sets("model.rope=YaRM(factor=2.0)"), "there is no part 'YaRM'. Did you mean YaRN?"),
    "misspelt part in another case": (
        sets("model.rope=Yarn(factor=2.0)"),
        "Did you mean YaRN? Expected FrequencyRule or None (AxialRope, ",
    ),
    "no part": (sets("data.tokenizer=foo"), "Pipeline.tokenizer = 'foo': expected Tokenizer (ByteTokenizer, HFTokenizer)"),
    "bracket left open": (sets("model.rope=YaRN(factor=2.0"), "'YaRN(factor=2.0': '(' was never closed"),
    "axis longer than an index": (
        sets("model.vocab=99999999999"),
        "parameter embedding is of shape (99999999999, 128): expected axes of at most 2^31 - 1",
    ),
    "seed beyond JAX's": (sets("seed=4294967296"), "Experiment.seed = 4294967296: expected 0 to 2^32 - 1"),
    "impossible value": (sets("steps=0"), "Experiment.steps = 0: expected at least 1"),
    "factor below 1": (
        sets("model.rope=YaRN(factor=0.5, original_length=128)"),
        "model.rope: YaRN.factor = 0.5: expected at least 1",
    ),
    "heads do not divide": (
        sets("model.pattern[0].mixer.heads=6"),
        "model.pattern[0].mixer: Attention.heads = 6: expected a multiple of kv_heads = 4",
    ),
    "odd heads": (sets("model.pattern[0].mixer.head_dim=7"), "model.pattern[0].mixer.head_dim = 7 does not fit its rope"),
    "context does not divide": (sets("mesh.context=3"), "data.length = 256: expected a multiple of 3 (mesh.context 3)"),
    "batch does not divide": (
        sets("data.batch_size=12", "mesh.data=2", "accumulation=4"),
        "data.batch_size = 12: expected a multiple of 8 (mesh.data 2 * accumulation 4)",
    ),
    "heads do not divide over the mesh": (
        sets("mesh.tensor=8"),
        "model.pattern[0].mixer.heads = 4: expected a multiple of 8 (mesh.tensor 8)",
    ),
    "more devices than there are": (
        sets("mesh.data=16"),
        "mesh = data 16 = 16 devices: expected at most the 8 there are",
    ),
    "vocabulary too small": (sets("model.vocab=256"), "model.vocab = 256: expected at least the 259 ids of data.tokenizer"),
    "warm-up longer than the run": (sets("optimizer.learning_rate.warmup=500"), "warmup = 500: expected fewer than"),
    "roles that nothing has": (
        sets("model.pattern[0].mixer.mask=Hide(query_role=0, key_role=1)"),
        "model.pattern[0].mixer.mask = Hide(query_role=0, key_role=1): hides roles",
    ),
    "data that are not there": (
        sets("data.mixture[0].rows.source=TextFolder(path='nowhere')"),
        "data.mixture[0].rows.source: TextFolder.path = 'nowhere': there is no such folder",
    ),
    "misspelt flag": ([QUICK, "--dry_rum"], "Unknown command line flag 'dry_rum'. Did you mean: dry_run"),
    "extra argument": ([QUICK, "quickly"], "'quickly' is no flag"),
    "wrong value of a flag": ([QUICK, "--dry_run=maybe"], "--dry_run=maybe"),
}


@pytest.mark.parametrize(("argv", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_in_one_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("a run was started"))
    assert run(train.main, argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("train: ") and err.endswith("\n") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("content", [b"\x7fELF\xff", b"[]", b'{"a": 1}'])
def test_a_file_that_is_no_config_is_told_in_one_line(content, capsys, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    for argv in ([f"--run_dir={tmp_path}"], [f"--config=config_file:{tmp_path}/config.json"]):
        assert run(train.main, argv) == 2
        err = capsys.readouterr().err
        assert "config.json: not a config" in err and err.count("\n") == 1


def test_folders_that_cannot_be_made_are_told_in_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert run(train.main, [QUICK, f"--run_dir={tmp_path}/file/run"]) == 2
    err = capsys.readouterr().err
    assert "cannot be made: Not a directory" in err and err.count("\n") == 1


def test_a_refused_start_changes_nothing(capsys, tmp_path):
    """A first start without text for one row, then one that is corrected in what the config is known by."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_bytes(b"a \xff")
    argv = sets(f"data.mixture[0].rows.source=TextFolder(path='{text}')", "steps=30")
    assert run(train.main, [*argv, f"--run_dir={tmp_path}/run"]) == 2
    assert "not UTF-8 at byte 2" in capsys.readouterr().err
    (text / "a.txt").write_text("a")
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        run(train.main, [*argv, "--config=set:seed=1", f"--run_dir={tmp_path}/run"])
    assert read_config(tmp_path / "run").seed == 1


def test_divergence_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    def diverging(*_):
        raise TrainingDiverged(7, {"loss": float("nan")}, 4)

    monkeypatch.setattr(train, "train", diverging)
    assert run(train.main, [QUICK, f"--run_dir={tmp_path}"]) == 1
    told = "train: training diverged at step 7: loss = nan; the last good checkpoint is of step 4\n"
    assert capsys.readouterr().err == told


def test_a_run_folder_keeps_to_its_config(capsys, tmp_path):
    evaluation = quick_text.evaluate(model="reader")
    given = "--config=config:recipes.quick_text.evaluate(model='reader')"
    ablation = "--config=config:ablations.rope_extension.quickstart"
    for main, held, argv, field in (
        (train.main, quick_text.quick(), sets("seed=1"), "seed: 0 against 1"),
        (evaluate.main, evaluation, [given, "--config=set:lengths=(8,)"], "lengths: (256, 512, 1024) against (8,)"),
        (ablate.main, rope_extension.quickstart(), [ablation, "--config=set:base.seed=1"], "base.seed: 0 against 1"),
    ):
        folder = open_run(tmp_path / field[0], held)
        before = {path: path.read_bytes() for path in folder.rglob("*")}
        for dry in ([], ["--dry_run"]):
            assert run(main, [*argv, f"--run_dir={folder}", *dry]) == 2
            out, err = capsys.readouterr()
            assert out == "" and f"they differ first in {field}; give another --run_dir" in err
        assert {path: path.read_bytes() for path in folder.rglob("*")} == before


@pytest.mark.parametrize("again", ["--run_dir={}", "--config=config_file:{}/config.json"])
def test_a_run_is_repeated_from_its_folder_alone(again, monkeypatch, tmp_path):
    experiment = edit(quick_text.quick(), "seed", 5)
    open_run(tmp_path, experiment)
    seen = []
    monkeypatch.setattr(train, "train", lambda *arguments: seen.append(arguments))
    with pytest.raises(AttributeError):  # the stand-in gives no result to print
        run(train.main, [again.format(tmp_path)])
    assert seen == [(experiment, tmp_path)]


def test_edits_alone_are_of_the_run_of_the_folder(monkeypatch, tmp_path):
    open_run(tmp_path, quick_text.quick())
    seen = []
    monkeypatch.setattr(train, "train", lambda experiment, _: seen.append(experiment))
    with pytest.raises(AttributeError):
        run(train.main, ["--config=set:steps=900", f"--run_dir={tmp_path}", "--config=fiddler:edits.windowed(64)"])
    assert seen == [edits(quick_text.quick(), [("steps", 900), ("model.pattern[0].mixer.mask", Window(size=64))])]


def test_the_default_folder_is_named_after_the_config(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(train, "train", lambda _, run_dir: seen.append(run_dir))
    with pytest.raises(AttributeError):
        run(train.main, [QUICK])
    assert seen == [Path("runs") / "recipes.quick_text.quick"]


def test_an_unexpected_exception_is_not_swallowed(monkeypatch, tmp_path):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(ValueError, match="a bug"):
        run(train.main, [QUICK, f"--run_dir={tmp_path}"])


def test_dry_run_shows_what_was_set_and_what_it_costs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = sets("model.rope=YaRN(factor=4.0, original_length=128)", "model.rope.base=5e5", "mesh.context=64")
    assert run(train.main, [*argv, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "\n    rope = YaRN\n      base = 500000.0\n" in out
    assert f"{'parameters':<48} 460,928\n" in out
    assert "trained window 128: critical dimension" in out and "logits x 1.296 at the end" in out


def test_directives_apply_from_left_to_right(capsys, tmp_path, monkeypatch):
    """A fiddler swaps a part in every layer; what it put there is a part like any other."""
    monkeypatch.chdir(tmp_path)
    argv = [QUICK, "--config=set:model.pattern[0].mixer.mask=Sink(size=2)", "--config=fiddler:edits.windowed(64)"]
    assert run(train.main, [*argv, "--config=set:model.pattern[0].mixer.mask.size=96", "--dry_run"]) == 0
    assert "mask = Window\n          size = 96\n" in capsys.readouterr().out


def test_an_ablation_names_the_edit_that_is_wrong(capsys):
    argv = ["--config=config:ablations.rope_extension.quickstart", "--config=set:variants[0].edits=(('model.rop', None),)"]
    assert run(ablate.main, argv) == 2
    err = capsys.readouterr().err
    assert "model: Decoder has no field 'rop'. Did you mean rope?" in err and err.count("\n") == 1


def test_help_lists_flags_and_configs(capsys):
    assert run(train.main, ["--help"]) == 0
    out = capsys.readouterr().out
    assert "Trains an experiment" in out and "--dry_run" in out and "recipes.quick_text.quick" in out
    assert "--config: config:<name> or config_file:<path>, then any of set:<field>=<value> and fiddler:<name>" in out
    assert "models.byte.Layer" not in config_names() and "models.byte.toy" in config_names()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        pytest.param(sets("model.rope.bse=3"), 2, "Did you mean base?", marks=pytest.mark.slow),
        (sets("mesh.data=2"), 2, "expected at most the 1 there are; on a CPU JAX_NUM_CPU_DEVICES sets how many"),
        ([QUICK, "--dry_run"], 0, ""),
    ],
)
def test_processes_end_with_the_status_and_no_traceback(argv, status, message, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.train", *argv]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not status or len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_early_ends_the_program_quietly(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.train", QUICK, "--dry_run"]
    child = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert "Traceback" not in child.stderr.read() and child.wait(timeout=120) == 141


@pytest.mark.parametrize(("argv", "status", "message"), [(["--help"], 0, "usage"), (["--fast"], 2, "unrecognized")])
def test_bench_reads_its_command_line(argv, status, message, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a benchmark was started"))
    with pytest.raises(SystemExit) as ended:
        bench.main(argv)
    assert ended.value.code == status and message in "".join(capsys.readouterr())


def test_bench_without_its_peers_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert bench.main([]) == 2
    assert capsys.readouterr().err == "bench: needs torch: use `make bench`\n"
