"""GPT-NeoX and Pythia: LayerNorm, both parts of a layer side by side, a plain MLP, part of a head rotated, and biases."""

from lcx.channels.mlp import MLP
from lcx.interop import rope
from lcx.interop.families.family import ACTIVATIONS, WORDS, Family, attention_of, rope_of
from lcx.interop.tensors import Part, Tensor, from_heads, linear, table, vector
from lcx.mixers.attention import Attention
from lcx.models.layer import Layer
from lcx.models.residual import ParallelTwoNorms, PreNorm
from lcx.norms import LayerNorm
from lcx.spec import SpecError


class GPTNeoX(Family):
    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    partial = True
    ignored = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")

    def layers(self, config):
        heads, width, word = config.need("num_attention_heads"), config.need("hidden_size"), config.get("hidden_act", "gelu")
        if word not in ACTIVATIONS:
            raise SpecError(f"config.json: hidden_act = {word!r}: expected one of {', '.join(ACTIVATIONS)}")
        biased = "all" if config.get("attention_bias", True) else "none"
        mixer = Attention(heads=heads, kv_heads=heads, head_dim=width // heads, bias=biased)
        channel = MLP(hidden=config.need("intermediate_size"), activation=ACTIVATIONS[word])
        residual = ParallelTwoNorms() if config.get("use_parallel_residual", True) else PreNorm()
        layer = Layer(mixer=mixer, channel=channel, norm=self._norm(config), residual=residual)
        return [layer] * config.need("num_hidden_layers")

    def rest(self, config):
        return {"final_norm": self._norm(config)}

    def rope_entry(self, config, entry, theta):
        own = {"rope_theta": config.get("rotary_emb_base", theta), "partial_rotary_factor": config.get("rotary_pct", 0.25)}
        return rope.read(own | entry, window=self.length(config))

    def config(self, spec, window):
        layer, mixer = spec.pattern[0], attention_of(spec)
        if not isinstance(layer.channel, MLP):
            raise SpecError(f"pattern[0].channel = {layer.channel}: expected MLP")
        entry, beside = rope.write(rope_of(spec), mixer.head_dim)
        inside = {key: value for key, value in entry.items() if key not in ("rope_theta", "partial_rotary_factor")}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": spec.vocab,
            "hidden_size": spec.width,
            "intermediate_size": layer.channel.hidden,
            "num_hidden_layers": spec.depth,
            "num_attention_heads": mixer.heads,
            "attention_bias": mixer.bias == "all",
            "hidden_act": WORDS[layer.channel.activation],
            "layer_norm_eps": spec.final_norm.eps,
            "use_parallel_residual": isinstance(layer.residual, ParallelTwoNorms),
            "tie_word_embeddings": spec.head == "tied",
            "max_position_embeddings": window if beside is None else beside,
            "rotary_emb_base": entry["rope_theta"],
            "rotary_pct": entry.get("partial_rotary_factor", 1.0),
        } | ({} if inside == {"rope_type": "default"} else {"rope_scaling": inside})

    def tensors(self, spec):
        width = spec.width
        yield table("gpt_neox.embed_in.weight", spec.vocab, width, ("embedding",))
        for n in range(spec.depth):
            period, slot = divmod(n, len(spec.pattern))
            layer, at, name = spec.pattern[slot], ("slots", slot), f"gpt_neox.layers.{n}"
            yield from self._attention(f"{name}.attention", width, layer.mixer, (*at, "mixer"), period)
            sizes = {
                "up": ("dense_h_to_4h", width, layer.channel.hidden),
                "down": ("dense_4h_to_h", layer.channel.hidden, width),
            }
            for own, (theirs, inputs, outputs) in sizes.items():
                yield linear(f"{name}.mlp.{theirs}.weight", inputs, outputs, (*at, "channel", own), period)
                yield vector(f"{name}.mlp.{theirs}.bias", outputs, (*at, "channel", f"{own}_bias"), period)
            for i, norm in enumerate(("input_layernorm", "post_attention_layernorm")):
                for part in ("weight", "bias"):
                    yield vector(f"{name}.{norm}.{part}", width, (*at, "norms", i, part), period)
        for part in ("weight", "bias"):
            yield vector(f"gpt_neox.final_layer_norm.{part}", width, ("final_norm", part))
        if spec.head == "untied":
            yield linear("embed_out.weight", width, spec.vocab, ("head",))

    def _attention(self, name, width, mixer, at, period):
        heads, size = mixer.heads, mixer.head_dim
        owns = ("query", "key", "value")
        parts = tuple(Part((*at, own), period, (2, 0, 1), (slice(None), n)) for n, own in enumerate(owns))
        yield Tensor(f"{name}.query_key_value.weight", (heads, 3, size, width), parts, (heads * 3 * size, width))
        yield from_heads(f"{name}.dense.weight", width, heads, size, (*at, "output"), period)
        if mixer.bias == "all":
            parts = tuple(Part((*at, f"{own}_bias"), period, (0, 1), (slice(None), n)) for n, own in enumerate(owns))
            yield Tensor(f"{name}.query_key_value.bias", (heads, 3, size), parts, (heads * 3 * size,))
            yield vector(f"{name}.dense.bias", width, (*at, "output_bias"), period)

    def _norm(self, config):
        return LayerNorm(eps=config.get("layer_norm_eps", 1e-5))
