"""Checkpoints: exact on other device counts, unharmed by what the run does next, and refused when they do not fit."""

import json
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from lcx.objectives.language_modeling import LanguageModeling
from lcx.parallel.mesh import MeshSpec
from lcx.positions.linear import LinearInterpolation
from lcx.spec import SpecError, edit
from lcx.training.checkpoint import Checkpointing, Checkpoints, folder, latest, load_model, restore_params
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant
from lcx.training.step import TrainState, TrainStep

GOLDEN = Path(__file__).parent / "golden"


def step_of(decoder, mesh):
    optimizer = AdamW(learning_rate=Constant(peak=1e-3))
    return TrainStep(model=decoder, objective=LanguageModeling(), optimizer=optimizer, mesh=mesh.build(), steps=10)


def numbered(step):
    """A state in which every entry of every array is another number."""
    count = iter(range(1, 1000))
    fill = lambda leaf: jax.device_put(jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) + next(count), leaf.sharding)
    return jax.tree.map(fill, step.abstract_state())


@pytest.fixture(scope="module")
def saved(decoder, tmp_path_factory):
    """(run folder, the state that was saved on eight devices at step 7)."""
    run_dir = tmp_path_factory.mktemp("run")
    state = numbered(step_of(decoder, MeshSpec(fsdp=4, tensor=2)))
    with Checkpoints(run_dir, Checkpointing()) as checkpoints:
        checkpoints.save(state, step=7, data={"next_index": 7}, meta={"steps": 10, "identity": {"seed": 0}})
    return run_dir, jax.tree.map(np.asarray, state)


def assert_equal(found, wanted):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mesh", [MeshSpec(), MeshSpec(context=2), MeshSpec(data=2, fsdp=2)])
def test_saved_on_eight_devices_restores_on_one_two_and_four(decoder, saved, mesh):
    run_dir, wanted = saved
    target = step_of(decoder, mesh).abstract_state()
    with Checkpoints(run_dir, Checkpointing()) as checkpoints:
        assert checkpoints.latest() == 7
        state, data = checkpoints.restore(7, target)
        meta = checkpoints.meta(7)
    assert len(meta.pop("checksums")["params"]) == len(jax.tree.leaves(wanted.params))
    assert meta == {"layout": 1, "step": 7, "steps": 10, "identity": {"seed": 0}}
    assert data == {"next_index": 7}
    assert int(state.step) == 7
    assert_equal((state.params, state.optimizer), (wanted.params, wanted.optimizer))
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


def test_models_for_evaluation_may_be_edited_but_not_resized(decoder, saved):
    run_dir, wanted = saved
    model = load_model(run_dir, edit(decoder, "rope", LinearInterpolation(factor=4.0)))
    assert_equal(nnx.to_pure_dict(nnx.state(model)), wanted.params)
    with pytest.raises(SpecError, match=r"parameter embedding is \(32, 8\) in the checkpoint, \(40, 8\) in the model"):
        load_model(run_dir, edit(decoder, "vocab", 40))
    with pytest.raises(SpecError, match=r"parameter head is absent in the checkpoint, \(8, 32\) in the model"):
        load_model(run_dir, edit(decoder, "head", "untied"))


def test_missing_checkpoints_are_named(decoder, saved, tmp_path):
    with pytest.raises(SpecError, match=r"no checkpoint of step 3; there are \[7\]"):
        load_model(saved[0], decoder, step=3)
    with pytest.raises(SpecError, match="no checkpoint"):
        load_model(tmp_path, decoder)
    assert latest(tmp_path) is None


def test_a_save_holds_what_the_state_was_although_the_next_step_overwrites_it(decoder, tmp_path):
    step = step_of(decoder, MeshSpec())
    state = numbered(step)
    grow = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    wanted = {}
    with Checkpoints(tmp_path, Checkpointing(keep=None)) as checkpoints:
        for number in range(1, 6):
            wanted[number] = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
            checkpoints.save(state, step=number, data={}, meta={})
            for _ in range(20):
                state = grow(state)
    with Checkpoints(tmp_path, Checkpointing(keep=None)) as checkpoints:
        for number, kept in wanted.items():
            found, _ = checkpoints.restore(number, step.abstract_state())
            assert_equal((found.params, found.optimizer), (kept.params, kept.optimizer))


def test_retention(decoder, tmp_path):
    state = numbered(step_of(decoder, MeshSpec()))
    with Checkpoints(tmp_path, Checkpointing(keep=2, keep_every=4)) as checkpoints:
        for number in range(1, 8):
            checkpoints.save(state, step=number, data={}, meta={})
    assert sorted(int(path.name) for path in folder(tmp_path).iterdir()) == [4, 6, 7]


def test_what_was_left_unfinished_is_gone_and_no_thread_is_left(tmp_path, monkeypatch):
    """A start that is refused closes at once; a thread that works on behind it would fail when the interpreter ends."""
    started = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    unfinished = folder(tmp_path) / f"3{ocp.utils.TMP_DIR_SUFFIX}-0"
    (unfinished / "params").mkdir(parents=True)
    with Checkpoints(tmp_path, Checkpointing()) as checkpoints:
        assert not unfinished.exists() and not started
        monkeypatch.undo()
        assert checkpoints.latest() is None


def test_another_layout_is_refused(decoder, tmp_path):
    state = numbered(step_of(decoder, MeshSpec()))
    with Checkpoints(tmp_path, Checkpointing()) as checkpoints:
        checkpoints.save(state, step=1, data={}, meta={})
    (meta,) = (folder(tmp_path) / "1" / "meta").glob("metadata")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"layout": 99}))
    with pytest.raises(SpecError, match="checkpoint layout 99; this version reads layout 1"):
        load_model(tmp_path, decoder)


def no_item(name):
    return lambda step: shutil.rmtree(step / name)


def garbage(name, pattern):
    def damage(step):
        for path in (step / name).rglob(pattern):
            if path.is_file():
                path.write_bytes(b"garbage")

    return damage


DAMAGE = {
    "no params": no_item("params"),
    "no optimizer": no_item("optimizer"),
    "no data": no_item("data"),
    "no meta": no_item("meta"),
    "garbage in the arrays": garbage("params", "d/*"),
    "garbage in the arrays' index": garbage("params", "manifest.ocdbt"),
    "garbage in the shapes": garbage("params", "_METADATA"),
    "garbage in the meta": garbage("meta", "metadata"),
    "garbage in the data": garbage("data", "metadata"),
}


@pytest.fixture(scope="module")
def two(decoder, tmp_path_factory):
    """A run folder with checkpoints of the steps 3 and 4."""
    run_dir = tmp_path_factory.mktemp("two")
    with Checkpoints(run_dir, Checkpointing()) as checkpoints:
        for number in (3, 4):
            checkpoints.save(numbered(step_of(decoder, MeshSpec())), step=number, data={}, meta={})
    return run_dir


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_told_in_one_line_with_the_step_that_is_left(decoder, two, tmp_path, damage):
    run_dir = tmp_path / "run"
    shutil.copytree(two, run_dir)
    target = step_of(decoder, MeshSpec()).abstract_state()
    damage(folder(run_dir) / "4")
    with Checkpoints(run_dir, Checkpointing()) as checkpoints, pytest.raises(SpecError) as error:
        checkpoints.meta(4)
        checkpoints.restore(4, target)
    message = str(error.value)
    assert f"{folder(run_dir)}/4/" in message and "\n" not in message and len(message) < 500
    assert f"cannot be read ({type(error.value.__cause__).__name__}: " in message
    assert f"delete {folder(run_dir)}/4 to go on from step 3" in message
    shutil.rmtree(folder(run_dir) / "4")
    assert int(load_model(run_dir, decoder).embedding[0, 0]) >= 1


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_an_altered_array_is_refused(decoder, two, tmp_path, item):
    """What the array file says is not what was saved: here another state's item in the place of the saved one."""
    run_dir, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(two, run_dir)
    step = step_of(decoder, MeshSpec())
    state = numbered(step)
    altered = {**state.params, "embedding": state.params["embedding"].at[3, 2].multiply(1.0001)}
    moments = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1), state.optimizer)
    with Checkpoints(other, Checkpointing()) as checkpoints:
        changed = TrainState(params=altered, optimizer=moments, step=state.step)
        checkpoints.save(changed, step=4, data={}, meta={})
    shutil.rmtree(folder(run_dir) / "4" / item)
    shutil.copytree(folder(other) / "4" / item, folder(run_dir) / "4" / item)
    with Checkpoints(run_dir, Checkpointing()) as checkpoints:
        with pytest.raises(SpecError, match=rf"4/{item}: cannot be read .*is not what was saved.*go on from step 3"):
            checkpoints.restore(4, step.abstract_state())
        checkpoints.restore(3, step.abstract_state())
    if item == "params":
        with pytest.raises(SpecError, match=r"\['embedding'\] is not what was saved"):
            load_model(run_dir, decoder)


def test_checkpoint_of_layout_1_still_loads():
    """`golden/layout_1` was written by `Checkpoints.save` when layout 1 was new: parameters counted up from 0."""
    shapes = {
        "embedding": jax.ShapeDtypeStruct((4, 2), jnp.float32),
        "slots": {0: {"gate": jax.ShapeDtypeStruct((3,), jnp.float32)}},
    }
    found = restore_params(GOLDEN / "layout_1", shapes)
    np.testing.assert_array_equal(found["embedding"], np.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(found["slots"][0]["gate"], np.arange(3.0))
