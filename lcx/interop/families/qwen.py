"""Qwen2 and Qwen2.5 (biases on queries, keys and values) and Qwen3 (norms of queries and keys instead)."""

from lcx.attention.mask import Causal, Window
from lcx.interop.families.config import Config
from lcx.interop.families.family import LlamaLike
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.norms import RMSNorm
from lcx.spec import SpecError, edit

SLIDING, FULL = "sliding_attention", "full_attention"


class Qwen2(LlamaLike):
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    window, keys = 32768, 32
    biased = "qkv"

    def attention(self, config, n):
        return edit(super().attention(config, n), "mask", layer_mask(config, n))

    def config(self, spec, window):
        return super().config(spec, window) | layer_types(spec)


class Qwen3(Qwen2):
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    biased = "none"

    def attention(self, config, n):
        head_dim = config.get("head_dim", 128)
        mixer = edit(super().attention(config, n), "qk_norm", RMSNorm(eps=config.get("rms_norm_eps", self.eps)))
        return edit(mixer, "head_dim", head_dim)


def layer_mask(config: Config, n: int) -> Causal | Window:
    """That of layer n: `layer_types`, or a window from `max_window_layers` on where `use_sliding_window` says so."""
    config.get("sliding_window", None)
    uses, size = config.get("use_sliding_window", False), config.entries.get("sliding_window", 4096)  # null is no window
    first, types = config.get("max_window_layers", 28), config.get("layer_types", None)
    if types is None:
        return Window(size=size) if uses and size is not None and n >= first else Causal()
    return mask_of(types, n, size)


def mask_of(types: list[str], n: int, size: int | None) -> Causal | Window:
    """What an entry of `layer_types` says of layer n."""
    if n >= len(types) or types[n] not in (SLIDING, FULL):
        found = "missing" if n >= len(types) else repr(types[n])
        raise SpecError(f"config.json: layer_types[{n}] = {found}: expected {SLIDING!r} or {FULL!r}")
    if types[n] == FULL:
        return Causal()
    if size is None:
        raise SpecError(f"config.json: layer_types[{n}] = {SLIDING!r} beside sliding_window = null: expected its tokens")
    return Window(size=size)


def layer_types(spec: Decoder) -> dict:
    """What config.json says of the windows of a decoder's layers; nothing where there is none."""
    masks = [layer.mixer.mask for layer in spec.pattern if isinstance(layer.mixer, Attention)] * spec.periods
    sizes = sorted({mask.size for mask in masks if isinstance(mask, Window)})
    if not sizes:
        return {}
    if len(sizes) > 1:
        raise SpecError(f"windows of {sizes} tokens: expected one size")
    types = [SLIDING if isinstance(mask, Window) else FULL for mask in masks]
    return {"use_sliding_window": True, "sliding_window": sizes[0], "layer_types": types}
