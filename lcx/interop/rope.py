"""Rope entries of a `config.json` and frequency rules, one for one.

Older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`, in which everything stands, some of them an
entry for each kind of layer. An entry of a kind, or with a key, that is not known here is refused: it would turn otherwise.
"""

from typing import Any

from lcx.interop.entries import check
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.linear import LinearInterpolation
from lcx.positions.llama3 import Llama3
from lcx.positions.longrope import LongRoPE
from lcx.positions.ntk import NTK
from lcx.positions.proportional import Proportional
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"},
    "proportional": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
}


def read(entry: dict[str, Any], *, window: int, original: int | None = None) -> FrequencyRule:
    """The rule of a whole entry, `rope_theta` in it.

    window: `max_position_embeddings`. original: `original_max_position_embeddings` of the config itself. Raises SpecError for
    what is not known.
    """
    for key, value in entry.items():
        check(key, value, "config.json: rope entry")
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind not in _KEYS:
        raise SpecError(f"config.json: rope_type = {kind!r}: expected one of {', '.join(_KEYS)}")
    for key, value in entry.items():
        if key not in _COMMON | _KEYS[kind] and value is not None:
            raise SpecError(f"config.json: rope entry {key} = {value!r} beside rope_type = {kind!r}: not known there")
    for key in _NEEDED.get(kind, ()):
        if entry.get(key) is None:
            raise SpecError(f"config.json: rope entry {key} is missing beside rope_type = {kind!r}: expected it there")
    entry = {key: value for key, value in entry.items() if value is not None}
    if "rope_theta" not in entry:
        raise SpecError("config.json: rope_theta = null: expected the base of the rope")
    base, share = float(entry["rope_theta"]), float(entry.get("partial_rotary_factor", 1.0))
    turned = {"base": base, "rotary": share}
    trained = original or entry.get("original_max_position_embeddings", window)
    factor = float(entry.get("factor", window / trained))
    if kind == "default":
        return Rope(**turned)
    if kind == "linear":
        return LinearInterpolation(factor=factor, **turned)
    if kind == "dynamic":
        return DynamicNTK(factor=factor, original_length=window, **turned)
    if kind == "proportional":
        return Proportional(base=base, ratio=share, factor=float(entry.get("factor", 1.0)))
    if kind == "llama3":
        low, high = float(entry["low_freq_factor"]), float(entry["high_freq_factor"])
        return Llama3(factor=factor, original_length=trained, low=low, high=high, **turned)
    if kind == "longrope":
        lists = {name: tuple(map(float, entry[f"{name}_factor"])) for name in ("short", "long")}
        given = entry.get("attention_factor")
        temperature = None if given is None else float(given)
        return LongRoPE(original_length=trained, factor=max(factor, 1.0), temperature=temperature, **lists, **turned)
    return _yarn(entry, factor, trained, turned)


def _yarn(entry: dict[str, Any], factor: float, trained: int, turned: dict[str, float]) -> YaRN:
    temperature, both = entry.get("attention_factor"), entry.get("mscale") and entry.get("mscale_all_dim")
    scales = {name: float(entry[name]) for name in ("mscale", "mscale_all_dim")} if both and temperature is None else {}
    return YaRN(
        factor=factor,
        original_length=trained,
        fast=float(entry.get("beta_fast") or 32),
        slow=float(entry.get("beta_slow") or 1),
        truncate=bool(entry.get("truncate", True)),
        temperature="yarn" if temperature is None else float(temperature),
        **scales,
        **turned,
    )


def write(rule: FrequencyRule, head_dim: int) -> tuple[dict[str, Any], int | None]:
    """(a whole entry, the window that it must stand beside or None) of a rule. Raises SpecError for one that has no entry."""
    if rule.pairing != "half" or rule.sections:
        raise SpecError(f"rope = {rule}: expected pairing 'half' and one axis, which config.json can say")
    entry: dict[str, Any] = {"rope_theta": rule.base}
    if rule.rotary != 1:
        entry["partial_rotary_factor"] = rule.rotary
    kind = type(rule)
    if kind is Rope:
        return entry | {"rope_type": "default"}, None
    if kind is NTK:  # another base, and nothing more
        rotated = rule.rotated(head_dim)
        return entry | {"rope_type": "default", "rope_theta": rule.base * rule.factor ** (rotated / (rotated - 2))}, None
    if kind is LinearInterpolation:
        return entry | {"rope_type": "linear", "factor": rule.factor}, None
    if kind is DynamicNTK and rule.step == 1:
        return entry | {"rope_type": "dynamic", "factor": rule.factor}, rule.original_length
    if kind is Proportional:
        return entry | {"rope_type": "proportional", "partial_rotary_factor": rule.ratio, "factor": rule.factor}, None
    if kind is Llama3:
        ends = {"low_freq_factor": rule.low, "high_freq_factor": rule.high}
        return entry | {"rope_type": "llama3", "factor": rule.factor} | ends | _trained(rule), None
    if kind is LongRoPE and not rule.kept_positions:
        lists = {"short_factor": list(rule.short), "long_factor": list(rule.long)}
        given = {} if rule.temperature is None else {"attention_factor": rule.temperature}
        return entry | {"rope_type": "longrope", "factor": rule.factor} | lists | given | _trained(rule), None
    if kind is YaRN and rule.ramp == "index":
        return entry | _written_yarn(rule), None
    raise SpecError(f"rope = {rule}: expected a rule that config.json can say ({', '.join(_KEYS)})")


def _written_yarn(rule: YaRN) -> dict[str, Any]:
    entry = {"rope_type": "yarn", "factor": rule.factor, "beta_fast": rule.fast, "beta_slow": rule.slow} | _trained(rule)
    if not rule.truncate:
        entry["truncate"] = False
    if rule.mscale is not None:
        entry |= {"mscale": rule.mscale, "mscale_all_dim": rule.mscale_all_dim}
    if rule.temperature != "yarn":
        entry["attention_factor"] = rule.attention_factor(0)
    return entry


def _trained(rule: Any) -> dict[str, int]:
    return {"original_max_position_embeddings": rule.original_length}
