"""The quickstart compares what its docstring says."""

import pytest
from flax import nnx

from configs.ablations.rope_extension import TRAINED, quickstart
from lcx.data.sources import StandardLibrary
from lcx.evaluation.ablation import run
from lcx.evaluation.report import select
from lcx.positions.linear import LinearInterpolation
from lcx.positions.ntk import NTK
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.training.step import abstract_model

RULES = {"none": Rope, "interpolation": LinearInterpolation, "NTK": NTK, "YaRN": YaRN}


def test_every_method_is_scaled_to_the_length_it_is_measured_at():
    ablation = quickstart()
    assert ablation.base.data.length == TRAINED == 128
    cells = {"zero-shot": set(), "fine-tuned": set()}
    for arm in ablation.arms:
        trained = ablation.experiment(arm)
        assert type(trained.model.rope) is Rope and trained.data.length == TRAINED
        for variant in ablation.variants:
            used = ablation.experiment(arm, variant)
            rope, (length,) = used.model.rope, variant.lengths
            assert type(rope) is RULES[variant.method]
            assert rope == Rope() or rope.factor == length / TRAINED == variant.scale
            assert not isinstance(rope, YaRN) or rope.original_length == TRAINED
            assert used.data.length == (length if variant.finetune else TRAINED)
            assert (used.steps < trained.steps) == (variant.stage == "fine-tuned")
            cells[variant.stage].add((variant.method, length))
    assert cells["zero-shot"] == {(method, length) for method in RULES for length in (128, 256, 512, 1024)}
    assert cells["fine-tuned"] == {(method, 512) for method in RULES}


def test_arms_differ_in_the_convolution_alone_and_are_small():
    ablation = quickstart()
    with_it, without = (ablation.experiment(arm).model for arm in ablation.arms)
    assert with_it.embed_mixer.taps == 4 and without.embed_mixer is None
    for model in (with_it, without):
        sizes = [leaf.size for _, leaf in nnx.to_flat_state(abstract_model(model)[1])]
        assert 400_000 < sum(sizes) < 600_000


def test_a_killed_quickstart_loses_at_most_a_third_of_an_arm():
    base = quickstart().base
    assert base.checkpoint.every <= base.steps / 3


def test_no_document_is_trained_on_and_measured_with():
    ablation = quickstart()
    read, measured = ablation.base.data.mixture[0].rows.source, ablation.tasks[0].source
    assert isinstance(read, StandardLibrary) and isinstance(measured, StandardLibrary)
    assert not set(read.documents().names) & set(measured.documents().names)


@pytest.mark.slow
def test_the_comparison_comes_out_as_the_docstring_says(tmp_path):
    """The order of the methods, on any machine; the figures are those of one."""
    rows = run(quickstart(), tmp_path)

    def measured(arm: str, task: str, metric: str, length: int, stage: str, **where) -> dict[str, float]:
        found = select(rows, arm=arm, task=task, metric=metric, length=length, stage=stage, **where)
        return {row["method"]: row["value"] for row in found}

    needle = {n: measured("convolution", "needle", "exact", n, "zero-shot") for n in (128, 256, 512, 1024)}
    assert min(needle[128].values()) > 0.95
    for n in (256, 512, 1024):
        assert needle[n]["none"] < needle[n]["NTK"] < needle[n]["interpolation"] <= needle[n]["YaRN"] + 0.05
    text = {n: measured("plain", "text", "nll", n, "zero-shot", bucket="last half") for n in (256, 512, 1024)}
    for nll in text.values():
        assert min(nll, key=nll.get) == "YaRN" and nll["NTK"] < nll["interpolation"]
    assert text[256]["interpolation"] > text[256]["none"]
    tuned = measured("plain", "text", "nll", 512, "fine-tuned", bucket="last half")
    assert min(tuned, key=tuned.get) == "YaRN"
    assert text[512]["interpolation"] - tuned["interpolation"] > 0.3
