"""What positions come to in each variant of an ablation, before anything runs: a line or two a variant."""

from typing import Any

from lcx.evaluation.ablation import Ablation, Arm, Variant
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.position_figures import position_figures
from lcx.positions.rope import Rope


def variant_figures(ablation: Ablation) -> str:
    """Of every variant that edits the positions of its arm, or trains at other distances; nothing where none does. Arms that a
    variant does the same to share its lines."""
    alike: dict[tuple[str, str], list[str]] = {}
    for variant in ablation.variants:
        for arm in ablation.arms:
            if text := _figures(ablation, arm, variant):
                alike.setdefault((variant.name, text), []).append(arm.name)
    lines = []
    for (name, text), arms in alike.items():
        head = name if len(arms) == len(ablation.arms) else f"{', '.join(arms)}, {name}"
        lines += [f"{head}, {line}" for line in text.splitlines()]
    return "\n".join(["positions, at the longest length of each variant", *lines]) if lines else ""


def _figures(ablation: Ablation, arm: Arm, variant: Variant) -> str:
    begun, tuned, used = ablation.experiment(arm), ablation.experiment(arm, variant), ablation.measured(arm, variant)
    if _positions(used.model) == _positions(begun.model) and tuned.data.spread == begun.data.spread:
        return ""
    before, last = _ropes(begun.model), tuned if variant.finetune else begun  # trained so
    trained = begun.data.spread if all(type(rule) is Rope for rule in before) else begun.data.length
    spread = last.data.spread if _ropes(last.model) == _ropes(used.model) else None
    slots: dict[str, list[str]] = {}
    for name, text in position_figures(used.model, max(variant.lengths), trained, spread).items():
        slots.setdefault(text, []).append(name)
    whole = len(used.model.pattern) == 1
    short = lambda names: names[0].replace(" of pattern[0]", "") if whole else "; ".join(names)
    return "\n".join(f"{short(names)}: {text}" for text, names in slots.items())


def _ropes(model: Decoder) -> list[Any]:
    mixers = [layer.mixer for layer in model.pattern if isinstance(layer.mixer, Attention)]
    return [rule for mixer in mixers if (rule := model.rope_of(mixer)) is not None]


def _positions(model: Decoder) -> list[Any]:
    """What decides the positions of its attention layers."""
    mixers = [layer.mixer for layer in model.pattern if isinstance(layer.mixer, Attention)]
    return [(model.rope_of(mixer), mixer.distances, mixer.distance_bias, mixer.query_scale) for mixer in mixers]
