"""Phi-3 and Phi-3.5 mini: Llama with queries, keys and values in one matrix, and LongRoPE beyond the trained window."""

from lcx.attention.mask import Window
from lcx.interop.families.family import LlamaLike, attention_of, rope_of
from lcx.interop.tensors import Part, Tensor, from_heads, linear
from lcx.positions.longrope import LongRoPE
from lcx.spec import edit


class Phi3(LlamaLike):
    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    window, eps, partial = 4096, 1e-5, True

    def attention(self, config, n):
        size = config.get("sliding_window", None)
        mixer = super().attention(config, n)
        return mixer if size is None else edit(mixer, "mask", Window(size=size))

    def rope_entry(self, config, entry, theta):
        kind = entry.get("rope_type", entry.get("type", "default"))
        if kind in ("su", "yarn"):  # older names
            kind = "longrope"
        entry = {key: value for key, value in entry.items() if key != "type"} | {"rope_type": kind}
        if entry.get("rope_type") == "longrope":
            config.need("original_max_position_embeddings")  # of the config itself: an entry's own is not read there
        return super().rope_entry(config, entry, theta)

    def config(self, spec, window):
        mask = attention_of(spec).mask
        return super().config(spec, window) | {"sliding_window": mask.size if isinstance(mask, Window) else None}

    def rope_entries(self, spec, window):
        rule = rope_of(spec)
        found = super().rope_entries(spec, window)
        if not isinstance(rule, LongRoPE):
            return found | {"original_max_position_embeddings": window}
        entry = dict(found["rope_scaling"])
        return found | {
            "original_max_position_embeddings": entry.pop("original_max_position_embeddings"),
            "rope_scaling": entry,
        }

    def of_attention(self, name, width, mixer, at, period):
        heads, keys, size = mixer.heads, mixer.kv_heads, mixer.head_dim
        ends = {"query": (0, heads), "key": (heads, heads + keys), "value": (heads + keys, heads + 2 * keys)}
        parts = tuple(Part((*at, own), period, (2, 0, 1), (slice(*end),)) for own, end in ends.items())
        rows = heads + 2 * keys
        yield Tensor(f"{name}.qkv_proj.weight", (rows, size, width), parts, (rows * size, width))
        yield from_heads(f"{name}.o_proj.weight", width, heads, size, (*at, "output"), period)

    def of_channel(self, name, width, channel, at, period):
        hidden = channel.hidden
        parts = tuple(Part((*at, own), period, (1, 0), (n,)) for n, own in enumerate(("gate", "up")))
        yield Tensor(f"{name}.gate_up_proj.weight", (2, hidden, width), parts, (2 * hidden, width))
        yield linear(f"{name}.down_proj.weight", hidden, width, (*at, "down"), period)
