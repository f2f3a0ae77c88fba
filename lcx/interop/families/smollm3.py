"""SmolLM 3: Llama with a layer without rotation in every four, by `no_rope_layers`."""

from lcx.attention.mask import Window
from lcx.interop.families.family import LlamaLike
from lcx.interop.families.qwen import SLIDING, layer_types, mask_of
from lcx.models.decoder import Decoder
from lcx.spec import SpecError, edits


class SmolLM3(LlamaLike):
    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    theta, window, tied = 2_000_000.0, 32768, True

    def attention(self, config, n):
        every = config.get("no_rope_layer_interval", 4)
        turns = config.get("no_rope_layers", None)
        if turns is not None and n >= len(turns):
            raise SpecError(f"config.json: no_rope_layers of {len(turns)} layers: expected num_hidden_layers of them")
        turned = (n + 1) % every != 0 if turns is None else bool(turns[n])
        size, uses = config.get("sliding_window", None), config.get("use_sliding_window", False)
        types = config.get("layer_types", None)
        default = [SLIDING if uses and size is not None and not turned else "full_attention"] * (n + 1)
        mask = mask_of(default if types is None else types, n, size)
        heads = config.get("num_key_value_heads", 4)
        changes = [("rope", "model" if turned else "none"), ("mask", mask), ("kv_heads", heads)]
        return edits(super().attention(config, n), changes)

    def config(self, spec: Decoder, window):
        turns = [int(layer.mixer.rope != "none") for layer in spec.pattern] * spec.periods
        windows = any(isinstance(layer.mixer.mask, Window) for layer in spec.pattern)
        return (
            super().config(spec, window)
            | (layer_types(spec) if windows else {})
            | {"no_rope_layers": turns, "pad_token_id": None}
        )
