"""Llama 2, 3 and 3.1, and Mistral: pre-norm, SwiGLU, grouped queries. SmolLM and SmolLM 2 are Llamas by their config."""

from lcx.attention.mask import Window
from lcx.interop.families.family import LlamaLike, attention_of
from lcx.spec import edit


class Llama(LlamaLike):
    model_type = "llama"
    architecture = "LlamaForCausalLM"


class Mistral(LlamaLike):
    """Llama with a window in every layer where `sliding_window` says so."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    window, keys = 4096 * 32, 8

    def attention(self, config, n):
        mixer = super().attention(config, n)
        size = config.entries.get("sliding_window", 4096)  # null is no window
        config.get("sliding_window", None)
        return mixer if size is None else edit(mixer, "mask", Window(size=size))

    def config(self, spec, window):
        mask = attention_of(spec).mask
        return super().config(spec, window) | {"sliding_window": mask.size if isinstance(mask, Window) else None}
