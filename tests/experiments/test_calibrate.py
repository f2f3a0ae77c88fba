"""The program that measures: what it cannot read is refused before it reads, what it wrote is read beside what it was of."""

import numpy as np
import pytest

from experiments.calibrate import main
from experiments.program import run
from lcx.training.shipped import run_folder

QFILTERS = "--config=set:model.pattern[0].mixer.cache=KVCache(policy=Evict(score=QFilters(directions='reader_2k'), keep=0.2))"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--length=1024"], "--length=1024: expected at most data.length = 512, the model's window"),
        (["--outliers="], "--outliers=: expected shares"),
        (["--method=QFilters", "--sinks=3"], "--sinks: expected none beside --method=QFilters"),
        (["--config=set:model.pattern[0].mixer.heads=3"], "model.pattern[0].mixer"),
    ],
)
def test_refused(flags, words, tmp_path, capsys):
    assert run(main, ["--run_dir=reader", f"--to={tmp_path / 'made.npz'}", *flags]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "made.npz").exists()


@pytest.mark.slow
def test_a_model_is_measured_whatever_tables_its_cache_has(tmp_path, capsys):
    """And what the shipped tables say they are of is what is said here."""
    file = tmp_path / "made.npz"
    few = ["--length=64", "--windows=2", "--method=DuoAttention", f"--text={tmp_path}"]
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 20)
    assert run(main, ["--run_dir=reader", f"--to={file}", *few, QFILTERS]) == 0, capsys.readouterr().err
    with np.load(file) as made, np.load(run_folder("reader") / "duo_attention.npz") as shipped:
        assert made["model"] == shipped["model"] and made["gates"].shape == shipped["gates"].shape
