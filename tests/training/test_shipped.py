"""A shipped folder gives back the parameters that were exported, and refuses a model that is another; the reader retrieves."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from configs.models import byte, reader
from lcx.data.recall import Needles
from lcx.evaluation.evaluation import Evaluation, evaluate
from lcx.evaluation.report import select
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.spec import SpecError, edit, edits
from lcx.training import shipped
from lcx.training.checkpoint import latest, load_model
from lcx.training.loop import train
from lcx.training.run_folder import read_config

SPEC = byte.toy(width=32, layers=1)


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "config.txt", "metrics.jsonl"):
        (tmp_path / name).write_text("{}\n")
    size = shipped.export(SPEC.build(rngs=nnx.Rngs(3)), 7, tmp_path, tmp_path / "out")
    assert size == (tmp_path / "out" / shipped.WEIGHTS).stat().st_size < 4e6
    return tmp_path / "out"


def test_parameters_come_back(folder):
    assert latest(folder) == 7
    given, wanted = (nnx.state(m) for m in (load_model(folder, SPEC), SPEC.build(rngs=nnx.Rngs(3))))
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_parameters_are_refused(folder):
    with pytest.raises(SpecError, match=r"parameter head is absent in the file, \(32, 264\) in the model"):
        load_model(folder, edit(SPEC, "head", "untied"))


@pytest.mark.parametrize("cut", [b"junk", None])
def test_damaged_weights_are_refused(folder, cut):
    path = folder / shipped.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100] if cut is None else cut)
    with pytest.raises(SpecError, match=r"weights\.npz: cannot be read"):
        load_model(folder, SPEC)


@pytest.mark.parametrize("changes", [[], [("steps", 9000)], [("model.rope.base", 500.0)]])
def test_a_shipped_model_is_not_trained_on_in_its_folder(changes, tmp_path):
    model = shutil.copytree(shipped.run_folder("reader"), tmp_path / "model")
    before = {path: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(SpecError, match=r"holds a shipped model \(weights\.npz\).* with init_from=.*model"):
        train(edits(reader.train(), changes), model)
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_a_model_is_a_folder_or_a_name(folder):
    assert shipped.run_folder(folder) == folder
    with pytest.raises(SpecError, match="model 'nobody': no such run folder, nor a shipped model"):
        shipped.run_folder("nobody")


def test_the_reader_retrieves(tmp_path):
    evaluation = Evaluation(
        model="reader",
        lengths=(512,),
        tasks=(
            Retrieval(name="passkey", generator=Needles(), examples_each=64),
            Retrieval(name="multi_key", generator=Needles(needles=8, queries=1), examples_each=64),
        ),
    )
    exact = {row["task"]: row["value"] for row in select(evaluate(evaluation, tmp_path), metric="exact")}
    assert exact["passkey"] >= 0.95 and exact["multi_key"] >= 0.95


def test_the_reader_is_what_its_config_trains():
    folder = shipped.run_folder("reader")
    assert read_config(folder) == reader.train() and latest(folder) == reader.train().steps
