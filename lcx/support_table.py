"""What combines with what, as a table: every pair of variants goes through the validator's own rules.

The variants are found by walking the package, so a part that is added appears here, with its refusals, by itself.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, get_args

from lcx.attention.attend import Backend
from lcx.attention.communication import Communication
from lcx.attention.mask import Mask, Window
from lcx.cache.codecs.codec import Codec
from lcx.cache.codecs.plain import Plain
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.paged import PagedCache
from lcx.cache.policies.policy import Policy
from lcx.cache.ring import RingCache
from lcx.cache.selectors.selector import Selector
from lcx.channels.glu import GLU
from lcx.config_text import fields
from lcx.data.packing import PackedText, Packing
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import StandardLibrary
from lcx.memory.model_memory import ModelMemory
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Mixer
from lcx.models.decoder import REMAT, Decoder
from lcx.models.layer import Layer
from lcx.parallel.layout import Layout
from lcx.parallel.mesh import AXES, MeshSpec
from lcx.parallel.rules import Rules
from lcx.parts import parts
from lcx.positions.distance_plan import DistancePlan
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.linear_bias import LinearBias
from lcx.spec import Spec, SpecError, edits
from lcx.support import broken
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant

MOST = 2  # pairs that the summary names for a reason
Variants = Mapping[str, Any]  # by name: what stands in the field


@dataclasses.dataclass(frozen=True)
class Kind:
    """A choice of a config: the field that holds it, the variants there are today, and what else makes it matter."""

    field: str
    variants: Variants
    setting: tuple[tuple[str, Any], ...] = ()


def base() -> Experiment:
    """The smallest experiment that every kind has a field in."""
    mixer = Attention(heads=4, kv_heads=2, head_dim=8)
    layer = Layer(mixer=mixer, channel=GLU(hidden=32))
    rows = PackedText(source=StandardLibrary(), most=4)
    return Experiment(
        model=Decoder(vocab=264, width=32, pattern=(layer,), periods=1, documents=4),
        data=Pipeline(mixture=(Weighted(rows=rows),), length=64, batch_size=4),
        optimizer=AdamW(learning_rate=Constant(peak=1e-3)),
        steps=1,
    )


@functools.cache
def kinds() -> Mapping[str, Kind]:
    """The kinds of the table. Layouts and communications are tried where rows lie over two mesh axes."""
    attention = "model.pattern[0].mixer"
    meshes = {axis: MeshSpec(**{axis: 2}) for axis in AXES}
    rules = Rules(batch=("data",), sequence=("fsdp", "context"))
    shared = (("mesh", MeshSpec(fsdp=2, context=2)), ("model.rules", rules))  # rows over two axes
    return {
        "mixer": Kind(attention, _examples(Mixer) | {"Attention": base().model.pattern[0].mixer}),
        "memory": Kind("model.memory", {"no memory": None} | _examples(ModelMemory)),
        "ring": Kind(f"{attention}.cache", _rings(), ((f"{attention}.mask", Window(size=8)),)),
        "mask": Kind(f"{attention}.mask", _examples(Mask)),
        "rope": Kind("model.rope", _examples(FrequencyRule) | {"none": None}),
        "distances": Kind(f"{attention}.distances", {"plain": None} | _examples(DistancePlan)),
        "bias": Kind(f"{attention}.distance_bias", {"no bias": None} | _examples(LinearBias)),
        "sinks": Kind(f"{attention}.sinks", {name: name for name in ("none", "learned")}),
        "cache": Kind(f"{attention}.cache", _caches()),
        "backend": Kind(f"{attention}.backend", {name: name for name in get_args(Backend)}),
        "packing": Kind("data.mixture[0].rows.packing", _examples(Packing)),
        "layout": Kind("layout", _examples(Layout), shared),
        "communication": Kind("model.communication", _examples(Communication), shared),
        "mesh axis": Kind("mesh", meshes),
        "remat": Kind("model.remat", {name: name for name in REMAT}),
        "channels": Kind("model.channel_chunk", {"all tokens": None, "5 tokens": 5}),
        "vocabulary": Kind("objective.parts", {"whole": 1, "in 3 parts": 3}),
    }


def _caches() -> Variants:
    """Rotated and raw keys as they are, pages of them, and every codec, policy and selector of a KV cache."""
    dense = {f"{cache.keys} keys": cache for cache in DenseCache.examples()}
    raw = {True: "raw", False: "rotated"}
    codecs = {name: KVCache(codec=codec, keys=raw[codec.raw]) for name, codec in _examples(Codec).items() if codec != Plain()}
    policies = {name: KVCache(policy=policy, keys=raw[policy.raw]) for name, policy in _examples(Policy).items()}
    selectors = {name: KVCache(selector=selector) for name, selector in _examples(Selector).items()}
    return dense | {"pages": PagedCache()} | codecs | policies | selectors


def _rings() -> Variants:
    """Tried in a layer with a window."""
    return {f"ring of {keys} keys": RingCache(keys=keys) for keys in ("rotated", "raw")}


def support_table() -> str:
    """A Markdown table: each variant against each other kind, the reasons of the refusals below it.

    `all`: it combines with every variant of that kind. `-`: the kind has no field there, so there is nothing to combine.
    """
    reasons: list[str] = []
    header = ["", *kinds()]
    rows = [header, ["---"] * len(header)]
    for name, kind in kinds().items():
        for variant in kind.variants:
            rows.append([f"{name}: {variant}", *(_cell(name, variant, other, reasons) for other in kinds())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"({n}) {reason}" for n, reason in enumerate(reasons, start=1))])


def support_summary() -> str:
    """The variants of every kind, and the pairs of two kinds that are refused, with the reason: Markdown, for the README."""
    lines = ["| kind | variants | field |", "| --- | --- | --- |"]
    lines += [f"| {name} | {', '.join(kind.variants)} | `{kind.field}` |" for name, kind in kinds().items()]
    refused: dict[str, list[str]] = {}
    for (name, kind), (other, more) in itertools.combinations(kinds().items(), 2):
        for variant, candidate in itertools.product(kind.variants, more.variants):
            try:
                reason = refusal((name, variant), (other, candidate))
            except LookupError:
                continue
            if reason is not None:
                refused.setdefault(reason, []).append(f"{variant} with {candidate}")
    lines += ["", "Every pair of two kinds combines, but for:", ""]
    for reason, pairs in refused.items():
        shown = ", ".join(pairs[:MOST]) + (f" and {len(pairs) - MOST} more" if len(pairs) > MOST else "")
        lines.append(f"- {shown}: {reason}")
    return "\n".join(lines)


@functools.cache
def refusal(*choices: tuple[str, str]) -> str | None:
    """Why the smallest experiment with these (kind, variant) choices is refused; None if they combine.

    Raises LookupError if a choice leaves no field for a later one.
    """
    experiment = base()
    for name, variant in choices:
        kind = kinds()[name]
        if kind.field not in dict(fields(experiment)):
            raise LookupError(f"{name}: there is no {kind.field} here")
        try:
            experiment = edits(experiment, [*kind.setting, (kind.field, kind.variants[variant])])
        except SpecError as error:
            return str(error)
    return next(broken(experiment), None)


def _cell(name: str, variant: str, other: str, reasons: list[str]) -> str:
    """How a variant combines with those of another kind; new reasons are added to the list, and named by their number."""
    if name == other:
        return ""
    first, last = sorted([name, other], key=list(kinds()).index)
    marks = {}  # of each variant that does not combine
    for candidate in kinds()[other].variants:
        pair = {name: variant, other: candidate}
        try:
            reason = refusal((first, pair[first]), (last, pair[last]))
        except LookupError:
            marks[candidate] = "-"
            continue
        if reason is not None:
            if reason not in reasons:
                reasons.append(reason)
            marks[candidate] = f"({reasons.index(reason) + 1})"
    if len(marks) == len(kinds()[other].variants):
        return "-" if set(marks.values()) == {"-"} else f"none {min(marks.values())}"
    return "not " + ", ".join(f"{candidate} {mark}" for candidate, mark in marks.items()) if marks else "all"


def _examples(kind: type[Spec]) -> dict[str, Spec]:
    """The first example of every part of a kind, by class name."""
    found = {cls.__name__: tuple(cls.examples()) for cls in parts(kind)}
    return {name: examples[0] for name, examples in found.items() if examples}
