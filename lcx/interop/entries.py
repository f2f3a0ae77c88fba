"""What entries of a config.json are, by their keys: a value of another type is refused by the key that it stands at."""

import math
from collections.abc import Callable
from typing import Any

from lcx.spec import SpecError

_SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "sliding_window_pattern",
    "no_rope_layer_interval",
}  # fmt: skip
_NUMBERS = {
    "rms_norm_eps", "layer_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "factor", "low_freq_factor",
    "high_freq_factor", "attention_factor", "beta_fast", "beta_slow",
}  # fmt: skip
_FLAGS = {
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_parallel_residual", "truncate",
}  # fmt: skip


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: tuple[tuple[set[str], Callable[[Any], bool], str], ...] = (
    (_SIZES, lambda x: is_integer(x) and x >= 1, "a positive integer"),
    (_NUMBERS, lambda x: is_number(x) and x > 0, "a positive number"),
    (_FLAGS, lambda x: isinstance(x, bool), "true or false"),
    ({"mscale", "mscale_all_dim"}, is_number, "a number"),
    ({"max_window_layers"}, lambda x: is_integer(x) and x >= 0, "0 or a positive integer"),
    ({"short_factor", "long_factor"}, lambda x: isinstance(x, list) and all(map(is_number, x)), "a list of numbers"),
    ({"layer_types", "no_rope_layers"}, lambda x: isinstance(x, list), "a list, one entry a layer"),
    ({"rope_parameters", "rope_scaling"}, lambda x: isinstance(x, dict), "an object"),
    ({"rope_type", "type", "hidden_act", "hidden_activation"}, lambda x: isinstance(x, str), "a word"),
    (
        {"eos_token_id"},
        lambda x: is_integer(x) or (isinstance(x, list) and all(map(is_integer, x))),
        "a token's id or a list of ids",
    ),
)


def check(key: str, value: Any, place: str = "config.json:") -> None:
    """Raises SpecError for a value that is not null and not of the kind of its key. Other keys may hold anything."""
    for keys, fits, expected in _KINDS:
        if key in keys and value is not None and not fits(value):
            raise SpecError(f"{place} {key} = {value!r}: expected {expected}")
