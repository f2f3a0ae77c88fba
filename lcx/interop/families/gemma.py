"""Gemma 2 and Gemma 3 (text): norms before and after each part that hold the weight less 1, scaled embeddings, layers with
windows between layers without, tanh caps (2), norms of queries and keys and a rope of their own for windows (3)."""

import math
from typing import Any

from lcx.attention.mask import Window
from lcx.interop import rope
from lcx.interop.families.family import LlamaLike, attention_of, rope_of, split_entry
from lcx.interop.families.qwen import FULL, SLIDING, layer_types, mask_of
from lcx.models.residual import Sandwich
from lcx.norms import RMSNorm
from lcx.spec import SpecError, edits


class Gemma2(LlamaLike):
    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    window, tied = 8192, True
    activation, word = "hidden_activation", "gelu_pytorch_tanh"
    caps = (50.0, 30.0)  # defaults
    every = 2  # one layer in so many sees everything

    def attention(self, config, n):
        scalar, cap = config.get("query_pre_attn_scalar", 256), self._cap(config, "attn_logit_softcapping", self.caps[0])
        types, size = config.get("layer_types", None), config.get("sliding_window", 4096)
        every = config.get("sliding_window_pattern", self.every)
        config.get("_sliding_window_pattern", None)  # written beside layer_types, and not read
        mask = mask_of(types or [SLIDING if (i + 1) % every else FULL for i in range(n + 1)], n, size)
        sizes = [("head_dim", config.get("head_dim", 256)), ("kv_heads", config.get("num_key_value_heads", 4))]
        return edits(super().attention(config, n), [*sizes, ("scale", scalar**-0.5), ("softcap", cap), ("mask", mask)])

    def layers(self, config):
        config.expect("use_bidirectional_attention", False)
        config.get("hidden_act", None)  # written beside it and not read by the model
        return super().layers(config)

    def norms(self, config) -> dict[str, Any]:
        return {"norm": RMSNorm(eps=config.get("rms_norm_eps", self.eps), offset=1.0), "residual": Sandwich()}

    def rest(self, config):
        return {
            "final_norm": RMSNorm(eps=config.get("rms_norm_eps", self.eps), offset=1.0),
            "embed_scale": math.sqrt(config.need("hidden_size")),
            "logit_softcap": self._cap(config, "final_logit_softcapping", self.caps[1]),
        }

    def config(self, spec, window):
        mixer = attention_of(spec)
        found = (
            super().config(spec, window)
            | layer_types(spec)
            | {
                "query_pre_attn_scalar": _scalar(mixer.softmax_scale),
                "attn_logit_softcapping": mixer.softcap,
                "final_logit_softcapping": spec.logit_softcap,
            }
        )
        found.pop("use_sliding_window", None)
        return found

    def _cap(self, config, key: str, default: float | None) -> float | None:
        """null is no cap, a missing entry the default."""
        config.get(key, None)
        return config.entries.get(key, default)


class Gemma3(Gemma2):
    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    theta, window = 1_000_000.0, 131_072
    caps = (None, None)
    every = 6
    near = 10_000.0  # base of windows

    def attention(self, config, n):
        mixer = super().attention(config, n)
        if mixer.softcap is not None:
            raise SpecError(f"config.json: attn_logit_softcapping = {mixer.softcap}: expected null, as nothing applies it")
        norm = RMSNorm(eps=config.get("rms_norm_eps", self.eps), offset=1.0)
        mixer = edits(mixer, [("qk_norm", norm)])
        if not isinstance(mixer.mask, Window):
            return mixer
        entry = {"rope_theta": config.get("rope_local_base_freq", self.near)}
        entry |= self._entry(config, SLIDING)
        return edits(mixer, [("rope", rope.read(entry, window=self.length(config)))])

    def rope(self, config):
        entries = config.get("rope_parameters", {})
        if entries and not {FULL, SLIDING} & set(entries):
            raise SpecError(f"config.json: rope_parameters: expected an entry for {FULL} and one for {SLIDING}")
        own, older = self._entry(config, FULL), config.get("rope_scaling", {})
        if own and older and own != older:
            raise SpecError("config.json: rope_parameters and rope_scaling differ: expected one of them")
        return self.rope_entry(config, own or older, self.theta)

    def _entry(self, config, kind: str) -> dict[str, Any]:
        """That of a kind of layers in rope_parameters; nothing where there is none."""
        entry = config.get("rope_parameters", {}).get(kind) or {}
        if not isinstance(entry, dict):
            raise SpecError(f"config.json: rope_parameters.{kind} = {entry!r}: expected an object")
        return entry

    def rope_entries(self, spec, window):
        entry, _ = rope.write(rope_of(spec), attention_of(spec).head_dim)
        near = [layer.mixer.rope for layer in spec.pattern if isinstance(layer.mixer.mask, Window)]
        base = near[0].base if near and not isinstance(near[0], str) else self.near
        return {"max_position_embeddings": window, "rope_local_base_freq": base} | split_entry(entry)


def _scalar(scale: float) -> float | int:
    """The number whose root the scale is one by, whole where it can be."""
    found = scale**-2
    return round(found) if math.isclose(found, round(found), rel_tol=1e-9) else found
