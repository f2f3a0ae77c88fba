"""The quickstart compares what its docstring says."""

from flax import nnx

from configs.ablations.rope_extension import TRAINED, quickstart
from lcx.data.sources import StandardLibrary
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
