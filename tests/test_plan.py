"""The figures of a plan agree with arrays that are really made, by hand-derived counts and by the compiler."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from experiments import plan
from experiments.program import run
from lcx.attention.mask import Beyond
from lcx.attention.planner import estimates
from lcx.data.recall import Needles
from lcx.data.skipped import Skipped
from lcx.inference.serving import Serving
from lcx.models.position_figures import position_figures
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.parallel.topology import topology_devices
from lcx.plan import (
    activation_bytes,
    communication_report,
    compared,
    compiled,
    figures,
    largest_allocations,
    memory_figures,
    model_figures,
)
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.position_rule import PoSE
from lcx.positions.query_scale import LogN
from lcx.positions.rerope import ReRoPE
from lcx.positions.rope import Rope
from lcx.positions.self_extend import SelfExtend
from lcx.positions.yarn import YaRN
from lcx.serving_plan import serving_figures
from lcx.spec import SpecError, edit, edits
from lcx.support_table import base, kinds
from tests.inference.test_calibration import MODEL

ROOT = Path(__file__).parents[1]


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_parameters_and_bytes_are_those_of_the_state_that_training_makes():
    experiment = edit(base(), "mesh", MeshSpec(fsdp=2, tensor=2))
    state = experiment.training_step(experiment.mesh.build()).init()
    found = figures(experiment)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert found["parameter bytes"] == nbytes(state.params)
    assert found["optimizer bytes"] == nbytes(state.optimizer)
    on_first = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    held = 2 * on_first(state.params) + on_first(state.optimizer)
    assert found["parameter, gradient, optimizer bytes a device"] == held
    assert found["  of them embeddings"] == 264 * 32


def test_flops_of_both_conventions_by_hand():
    """One layer, 4 query and 2 key heads of 8, width 32, hidden 32, 4 rows of 64, tied head of 264 rows."""
    found = figures(base())
    matrices = 3 * 32 * 32 + 3 * 32 * 32 + 264 * 32
    visible, every = 4 * 64 * 65 // 2, 4 * 64 * 64
    pair = 2 * 4 * (8 + 8)
    assert found["training FLOPs a step, visible pairs only"] == 3 * (256 * 2 * matrices + visible * pair)
    assert found["training FLOPs a step, all pairs"] == 3 * (256 * 2 * matrices + every * pair)
    assert found["tokens a step"] == 256


def test_figures_of_a_model_in_use_by_hand():
    """The same layer: a forward pass is a third of training; the state holds 2 heads of 8 keys and values, and its places."""
    found, trained = model_figures(base().model, (64, 128)), figures(base())
    assert found["parameters"] == trained["parameters"] and found["parameter bytes"] == trained["parameter bytes"]
    assert 12 * found["forward FLOPs a row of 64, visible pairs only"] == trained["training FLOPs a step, visible pairs only"]
    assert 12 * found["forward FLOPs a row of 64, all pairs"] == trained["training FLOPs a step, all pairs"]
    grown = found["state bytes a row of 128"] - found["state bytes a row of 64"]
    assert grown == 64 * (2 * 2 * 8 + 6) * 4


def test_a_mask_that_sees_nothing_is_remarked():
    blind = edit(base(), "model.pattern[0].mixer.mask", Beyond(size=64))
    assert figures(blind)["seen by model.pattern[0].mixer"] == "nothing, by Beyond(size=64)"
    assert not any(name.startswith("seen by") for name in figures(base()))


def test_one_kind_of_devices_is_compiled_for(capsys):
    given = ["--config=config:recipes.quick_text.quick", "--compile", "--topology=v5e:1x1"]
    assert run(plan.main, given) == 2
    assert "--compile beside --topology=v5e:1x1: expected one of them" in capsys.readouterr().err


def test_runs_of_one_cost_share_a_block():
    roped, long = edit(base(), "model.rope", Rope(base=9.0)), edit(base(), "steps", 2 * base().steps)
    heads = [block.splitlines()[0] for block in compared({"a": base(), "b": roped, "c": long}).split("\n\n")]
    assert heads == ["each of a; b", "c"]


def test_wavelengths_by_hand():
    text = figures(edit(base(), "model.rope", Rope(base=10_000.0)))["rope of pattern[0], Rope"]
    turning = "4 pairs, wavelengths 6.283 to 6283 tokens, 2 turn within 64"
    assert text == f"{turning}; trained window 64: critical dimension 4, effective window 64; logits x 1 at the end"
    yarn = edit(base(), "model.rope", YaRN(factor=4.0, original_length=16))
    scaled = edit(yarn, "model.pattern[0].mixer.query_scale", LogN(original_length=16))
    (text,) = [value for name, value in figures(scaled).items() if "YaRN" in name]
    assert text.endswith("trained window 16: critical dimension 2, effective window 64; logits x 1.945 at the end")


def test_how_far_distance_plans_read_by_hand():
    """(64 - 8) 4 + 8 = 232 tokens, trained at 64, or at 16 with a YaRN of four times; (64 - 8) 2 + 8 = 120 in groups of two."""
    planned = lambda plan, rope=Rope(): edits(base(), [("model.pattern[0].mixer.distances", plan), ("model.rope", rope)])
    said = lambda experiment: position_figures(experiment.model, 64)["distances of pattern[0]"].partition("; ")[2]
    assert said(planned(SelfExtend(group=4, window=8))) == "stays within 64 positions up to 232 tokens"
    yarn = YaRN(factor=4.0, original_length=16)
    assert said(planned(SelfExtend(group=4, window=8), yarn)) == "stays within 64 positions up to 232 tokens"
    assert said(planned(ReRoPE(window=8))) == "stays within 64 positions at any length"
    groups = DimensionGroups(groups=(2, 4), window=8)
    assert said(planned(groups)) == "stays within 64 positions up to 120 tokens, 232 for some pairs of channels"


def test_skipped_positions_widen_what_training_shows():
    """Pairs of 4, 6.28 tokens a turn times 10 each: within 1024 turn three; after a YaRN of 4 times the first is as it was, the
    second turns in 251."""
    posed = edit(base(), "data.positions", PoSE(target=1024))
    found = figures(posed)
    widened = "3 turn within 1024; trained window 64, distances to 1024: critical dimension 6, effective window 1024"
    assert widened in found["rope of pattern[0], Rope"] and found["distances in rows"] == "below 1,024"
    said = lambda experiment: next(iter(position_figures(experiment.model, 64, spread=experiment.data.spread).values()))
    yarn = said(edit(posed, "model.rope", YaRN(factor=4.0, original_length=16)))
    assert "2 turn within 1024; trained window 16, distances to 1024: critical dimension 4, effective window 1024" in yarn
    assert said(edit(base(), "data.positions", PoSE(target=1024, chunks=1))) == said(base())
    assert edit(base(), "data.mixture[0].rows", Skipped(rows_of=Needles(), target=256)).data.spread == 256


def test_communication_is_estimated_of_queries_in_as_many_halves_as_there_are(monkeypatch):
    given, groups = [], DimensionGroups(groups=(2, 4), window=8)
    told = lambda work, *rest, **rates: given.append(work) or estimates(work, *rest, **rates)
    monkeypatch.setattr("lcx.plan.estimates", told)
    shared = edit(base(), "mesh", MeshSpec(context=4))
    for distances in (None, groups, edit(groups, "dimensions", "chosen.npy")):
        text = communication_report(edit(shared, "model.pattern[0].mixer.distances", distances), "TPU v5 lite")
        assert "communication of pattern[0] over context 4" in text
    assert given == [dataclasses.replace(given[0], halves=halves) for halves in (1, 1, 2)]


def test_activations_grow_with_rows_and_shrink_with_rematerialisation_and_accumulation():
    whole = activation_bytes(edit(base(), "data.batch_size", 8))
    half = activation_bytes(base())
    assert 1.9 * half < whole <= 2.1 * half
    assert activation_bytes(edits(base(), [("data.batch_size", 8), ("accumulation", 2)])) == half
    deep = edit(base(), "model.periods", 4)
    assert activation_bytes(edit(deep, "model.remat", "full")) < activation_bytes(deep) / 2


def test_compiled_bytes_cover_the_state():
    experiment = edit(base(), "mesh", MeshSpec(fsdp=2))
    found, held = compiled(experiment, jax.devices()), figures(experiment)
    assert found["compiled for"].startswith("2 x ")
    state = held["parameter, gradient, optimizer bytes a device"] - held["gradient bytes"] // 2
    assert state < found["argument bytes a device"] < 1.5 * state
    assert found["total bytes a device"] > found["argument bytes a device"]
    parts = [found[f"{part} bytes a device"] for part in ("parameter", "optimizer", "batch")]
    assert found["argument bytes a device"] == sum(parts) + 4  # and the number of the step
    assert any(name.endswith("bytes sent a device and step") for name in found) and "fits" not in found


def test_memory_of_a_chip_by_hand():
    """Of 30.75 GiB: arguments 20, outputs 21 of which 20 take the place of arguments, temporaries 9, code 0.5, host 3."""
    sizes = {"argument": 20, "output": 21, "alias": 20, "temp": 9, "generated_code": 0.5, "host_temp": 3}
    memory = types.SimpleNamespace(**{f"{name}_size_in_bytes": int(size * 2**30) for name, size in sizes.items()})
    found = memory_figures(memory, "TPU v4")
    assert found["total bytes a device"] == 30.5 * 2**30 and found["fits"] == "yes, by 0.25 GiB of 30.75"
    assert memory_figures(memory, "TPU v5 lite")["fits"] == "no, by 14.75 GiB of 15.75"
    assert found["temp bytes on the host"] == 3 * 2**30 and "argument bytes on the host" not in found


def test_the_largest_allocations_stay_in_the_message():
    report = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm.

    Total hbm usage >= 20.6G:
        reserved        263.00M
        arguments         1.1G

      Largest program allocations in hbm:

      1. Size: 6.00G
         Operator: op_name="jit(_step)/dot_general"
         Shape: f32[1024,1572864]{1,0:T(8,128)}
         Unpadded size: 6.00G
    """
    kept = largest_allocations(report).splitlines()
    assert [line.strip().split()[0] for line in kept] == [
        "RESOURCE_EXHAUSTED:",
        "Total",
        "reserved",
        "arguments",
        "1.",
        "Operator:",
        "Shape:",
    ]
    assert largest_allocations("RESOURCE_EXHAUSTED: temporaries (160.00G)") == "RESOURCE_EXHAUSTED: temporaries (160.00G)"


def test_what_combines_is_printed_and_stands_in_the_readme():
    """If it fails: what `plan --support` prints below the table goes into README, "What combines". In a process of its own,
    where no types are checked: thousands of configs are made."""
    command = [sys.executable, "-m", "experiments.plan", "--support"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    table, *summary = printed.partition("\n| kind |")
    assert "".join(summary).strip() in (Path(__file__).parents[1] / "README.md").read_text()
    assert all(f"| {name}: {variant} " in table for name, kind in kinds().items() for variant in kind.variants)
    number = re.search(r"not Hide \((\d+)\)", table)[1]
    assert f"({number}) model.pattern[0].mixer.mask = Hide" in table


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the tpu extra is installed")
def test_without_the_compiler_the_message_names_the_extra(capsys):
    argv = ["--config=config:recipes.quick_text.quick", "--topology=v5e:1x1"]
    assert run(plan.main, argv) == 2
    told = "plan: --topology=v5e:1x1 needs the TPU compiler: install the `tpu` extra (pip install -e '.[tpu]')\n"
    assert capsys.readouterr().err == told


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra")
@pytest.mark.parametrize(
    ("extra", "status", "messages"),
    [
        pytest.param(
            [
                "--config=set:model.pattern[0].mixer.backend=tpu",
                "--config=set:mesh.context=4",
                "--topology=v5e:2x2",
                "--dry_run",
            ],
            0,
            ("advised: ", "communication of pattern[0] over context 4"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--config=set:model.pattern[0].mixer.backend=gpu", "--topology=v5e:1x1"],
            2,
            ("plan: model.pattern[0].mixer.backend = 'gpu': expected 'auto', 'xla' or 'reference' on tpu",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--config=set:mesh.context=4", "--config=set:model.periods=1", "--topology=v5e:2x2"],
            0,
            ("4 x TPU v5 lite", "GiB of 15.75", "reduce bytes sent a"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--topology=v5e:2x2"],
            2,
            ("mesh = 1 devices: expected the 4 of --topology=v5e:2x2",),
            marks=pytest.mark.slow,
        ),
        (["--topology=v5e:banana"], 2, ("expected one such as v5e:16x16",)),
    ],
)
def test_the_tpu_compiler_compiles_the_step(extra, status, messages, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "experiments.plan", "--config=config:recipes.quick_text.quick(width=64)", *extra]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    said = done.stderr if status else done.stdout
    assert all(message in said for message in messages), said


@pytest.mark.parametrize("name, expected", [("v5p:16x16", "three sides"), ("v5e:32x32", "two sides, of at most 256 chips")])
def test_a_slice_that_does_not_exist_is_refused(name, expected):
    with pytest.raises(SpecError, match=f"--topology={name}: expected {expected}"):
        topology_devices(name)


def test_a_model_in_use_without_a_compiler():
    """Two rows of 64 + 16 tokens, keys and values of 2 layers, 2 heads of 8, in bfloat16; matrices too."""
    model = edit(MODEL, "compute", "bfloat16")
    alone = Serving(model=model, rows=2, prompt=64, answer=16)
    layer = 2 * 32 * 4 * 8 + 2 * 32 * 2 * 8 + 3 * 32 * 32
    norms, matrices = 5 * 32, 64 * 32 + 2 * layer
    slots = 2 * 2 * 80
    for serving, shares in ((alone, 1), (edits(alone, [("mesh", MeshSpec(tensor=2)), ("model.rules", Rules(sequence=()))]), 2)):
        found = serving_figures(serving)
        assert found["parameter bytes a device, as used"] == 4 * norms + 2 * matrices // shares
        held = found["state bytes of 2 rows"]
        assert held == 2 * found["state bytes a row of 80"] > slots * 2 * 2 * 8 * 2
        wanted = held if shares == 1 else f"at least {held // 2:,}; --topology, which compiles for a slice, says it"
        assert found["state bytes a device"] == wanted
