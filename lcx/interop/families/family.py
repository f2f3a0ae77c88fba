"""A model family of `transformers`: its config and its tensors, and a decoder's.

What most families share is here: layers of attention and gated channels under Llama's names. A family says what differs.
"""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from lcx.attention.all_gather import AllGather
from lcx.cache.dense import DenseCache
from lcx.channels.glu import GLU
from lcx.config_text import first_difference
from lcx.interop import rope
from lcx.interop.families.config import Config
from lcx.interop.tensors import Tensor, from_heads, heads_bias, linear, table, to_heads, vector
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.models.residual import PreNorm, Sandwich
from lcx.norms import RMSNorm
from lcx.parallel.rules import Rules
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import LengthRule
from lcx.spec import SpecError, edit, edits

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
WORDS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
NORMS = {
    PreNorm: ("input_layernorm", "post_attention_layernorm"),
    Sandwich: (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class Family(abc.ABC):
    """model_type, architecture: transformers' names. theta, window: defaults of a config that does not say them."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    theta: ClassVar[float] = 10_000.0
    window: ClassVar[int] = 2048
    tied: ClassVar[bool] = False
    eps: ClassVar[float] = 1e-6
    partial: ClassVar[bool] = False  # whether a share of a head can be rotated
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)  # endings of tensors that are no parameters

    @abc.abstractmethod
    def layers(self, config: Config) -> list[Layer]:
        """Every layer, first to last."""

    @abc.abstractmethod
    def config(self, spec: Decoder, window: int) -> dict[str, Any]:
        """What config.json says of a decoder; only `decoder` of it tells whether that is all. Raises SpecError."""

    def decoder(self, config: Config) -> Decoder:
        """The decoder of a config. Raises SpecError for what it does not know."""
        rule, layers = self.rope(config), self.layers(config)
        if isinstance(rule, LengthRule):  # turns keys anew
            layers = [edit(layer, "mixer.cache", DenseCache(keys="raw")) for layer in layers]
        pattern, periods = repeated(layers)
        depth = {"vocab": config.need("vocab_size"), "width": config.need("hidden_size"), "periods": periods}
        tied = config.get("tie_word_embeddings", self.tied)
        rest = self.rest(config) | {"head": "tied" if tied else "untied", "compute": compute(config)}
        return Decoder(pattern=pattern, rope=rule, **depth, **rest)

    def rest(self, config: Config) -> dict[str, Any]:
        """Further fields of the decoder."""
        return {"final_norm": RMSNorm(eps=config.get("rms_norm_eps", self.eps))}

    def length(self, config: Config) -> int:
        """Tokens that the model is for."""
        return config.get("max_position_embeddings", self.window)

    def rope(self, config: Config) -> FrequencyRule:
        return self.rope_entry(config, one_rope(config), self.theta)

    def rope_entry(self, config: Config, entry: dict[str, Any], theta: float) -> FrequencyRule:
        """The rule of an entry, which the config's own keys complete."""
        own = {"rope_theta": config.get("rope_theta", theta)}
        if (share := config.get("partial_rotary_factor", None)) is not None:
            own["partial_rotary_factor"] = share
        entry = own | entry
        turned, kind = entry.get("partial_rotary_factor") or 1, entry.get("rope_type", entry.get("type"))
        if turned != 1 and not self.partial and kind != "proportional":
            raise SpecError(f"config.json: partial_rotary_factor = {turned}: expected none for {self.model_type}")
        original = config.get("original_max_position_embeddings", None)
        return rope.read(entry, window=self.length(config), original=original)

    @abc.abstractmethod
    def tensors(self, spec: Decoder) -> Iterator[Tensor]:
        """Every tensor of a checkpoint of `spec`."""


class LlamaLike(Family):
    """Families with Llama's names: attention and a gated linear unit a layer."""

    biased: ClassVar[str] = "none"  # projections that have a bias where the config does not say
    activation: ClassVar[str] = "hidden_act"
    word: ClassVar[str] = "silu"  # of the activation, where the config does not say
    keys: ClassVar[int | None] = None  # key heads, likewise; None is as many as query heads

    def attention(self, config: Config, n: int) -> Attention:
        """That of layer n."""
        heads = config.need("num_attention_heads")
        keys = config.get("num_key_value_heads", self.keys or heads)
        if heads % keys:
            expected = f"expected a divisor of num_attention_heads = {heads}"
            raise SpecError(f"config.json: num_key_value_heads = {keys}: {expected}")
        biased = "all" if config.get("attention_bias", False) else self.biased
        return Attention(
            heads=heads,
            kv_heads=keys,
            head_dim=config.get("head_dim", config.need("hidden_size") // heads),
            bias=biased,
        )

    def layers(self, config):
        word = config.get(self.activation, self.word)
        if self.activation in config.entries and config.entries[self.activation] is None:
            word = None
        if word not in ACTIVATIONS:
            raise SpecError(f"config.json: {self.activation} = {word!r}: expected one of {', '.join(ACTIVATIONS)}")
        hidden, bias = config.need("intermediate_size"), bool(config.get("mlp_bias", False))
        channel = GLU(hidden=hidden, activation=ACTIVATIONS[word], bias=bias)
        norms = self.norms(config)
        return [
            Layer(mixer=self.attention(config, n), channel=channel, **norms) for n in range(config.need("num_hidden_layers"))
        ]

    def norms(self, config: Config) -> dict[str, Any]:
        return {"norm": RMSNorm(eps=config.get("rms_norm_eps", self.eps))}

    def config(self, spec, window):
        layer, mixer = spec.pattern[0], attention_of(spec)
        channel = layer.channel
        if not isinstance(channel, GLU):
            raise SpecError(f"pattern[0].channel = {channel}: expected GLU")
        found = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": spec.vocab,
            "hidden_size": spec.width,
            "intermediate_size": channel.hidden,
            "num_hidden_layers": spec.depth,
            "num_attention_heads": mixer.heads,
            "num_key_value_heads": mixer.kv_heads,
            "head_dim": mixer.head_dim,
            "rms_norm_eps": spec.final_norm.eps,
            self.activation: WORDS[channel.activation],
            "tie_word_embeddings": spec.head == "tied",
        }
        if mixer.bias == "all":
            found["attention_bias"] = True
        if channel.bias:
            found["mlp_bias"] = True
        return found | self.rope_entries(spec, window)

    def rope_entries(self, spec: Decoder, window: int) -> dict[str, Any]:
        """What config.json says of the model's rope."""
        entry, beside = rope.write(rope_of(spec), attention_of(spec).head_dim)
        window = window if beside is None else beside
        return {"max_position_embeddings": window} | split_entry(entry)

    def tensors(self, spec):
        width = spec.width
        yield table("model.embed_tokens.weight", spec.vocab, width, ("embedding",))
        for n in range(spec.depth):
            period, slot = divmod(n, len(spec.pattern))
            layer, at = spec.pattern[slot], ("slots", slot)
            name = f"model.layers.{n}"
            yield from self.of_attention(f"{name}.self_attn", width, layer.mixer, (*at, "mixer"), period)
            yield from self.of_channel(f"{name}.mlp", width, layer.channel, (*at, "channel"), period)
            for i, norm in enumerate(NORMS[type(layer.residual)]):
                yield vector(f"{name}.{norm}.weight", width, (*at, "norms", i, "weight"), period)
        yield vector("model.norm.weight", width, ("final_norm", "weight"))
        if spec.head == "untied":
            yield linear("lm_head.weight", width, spec.vocab, ("head",))

    def of_attention(self, name: str, width: int, mixer: Attention, at: tuple, period: int) -> Iterator[Tensor]:
        size = mixer.head_dim
        projections = (("query", "q", mixer.heads), ("key", "k", mixer.kv_heads), ("value", "v", mixer.kv_heads))
        for ours, theirs, heads in projections:
            yield to_heads(f"{name}.{theirs}_proj.weight", width, heads, size, (*at, ours), period)
            if mixer.bias != "none":
                yield heads_bias(f"{name}.{theirs}_proj.bias", heads, size, (*at, f"{ours}_bias"), period)
            if mixer.qk_norm is not None and ours != "value":
                yield vector(f"{name}.{theirs}_norm.weight", size, (*at, f"{ours}_norm", "weight"), period)
        yield from_heads(f"{name}.o_proj.weight", width, mixer.heads, size, (*at, "output"), period)
        if mixer.bias == "all":
            yield vector(f"{name}.o_proj.bias", width, (*at, "output_bias"), period)

    def of_channel(self, name: str, width: int, channel: GLU, at: tuple, period: int) -> Iterator[Tensor]:
        sizes = {"gate": (width, channel.hidden), "up": (width, channel.hidden), "down": (channel.hidden, width)}
        for part, size in sizes.items():
            yield linear(f"{name}.{part}_proj.weight", *size, (*at, part), period)
            if channel.bias:
                yield vector(f"{name}.{part}_proj.bias", size[1], (*at, f"{part}_bias"), period)


def one_rope(config: Config) -> dict[str, Any]:
    """The rope entry of a config, under its newer or its older key. Raises SpecError where both say something else."""
    newer, older = config.get("rope_parameters", {}), config.get("rope_scaling", {})
    if newer and older and newer != older:
        raise SpecError("config.json: rope_parameters and rope_scaling differ: expected one of them")
    return newer or older


def split_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """A whole rope entry as every version of transformers reads it: the base and the share outside."""
    inside = {key: value for key, value in entry.items() if key not in ("rope_theta", "partial_rotary_factor")}
    outside = {key: entry[key] for key in ("rope_theta", "partial_rotary_factor") if key in entry}
    return outside if inside == {"rope_type": "default"} else outside | {"rope_scaling": inside}


def repeated(layers: Sequence[Layer]) -> tuple[tuple[Layer, ...], int]:
    """(pattern, periods): the shortest pattern that gives the layers."""
    fits = lambda size: len(layers) % size == 0 and all(layer == layers[n % size] for n, layer in enumerate(layers))
    size = next(filter(fits, range(1, len(layers) + 1)))
    return tuple(layers[:size]), len(layers) // size


def compute(config: Config) -> str:
    """bfloat16 where the weights are; float32 holds what all others are."""
    return "bfloat16" if config.get("dtype", config.get("torch_dtype", "float32")) == "bfloat16" else "float32"


def attention_of(spec: Decoder) -> Attention:
    """The mixer of the first layer. Raises SpecError if it is not attention."""
    mixer = spec.pattern[0].mixer
    if not isinstance(mixer, Attention):
        raise SpecError(f"pattern[0].mixer: {type(mixer).__name__}: expected Attention")
    return mixer


def rope_of(spec: Decoder) -> FrequencyRule:
    if spec.rope is None:
        raise SpecError("rope = None: expected a rule")
    return spec.rope


def same_model(found: Decoder, wanted: Decoder) -> str | None:
    """Where two decoders give other logits for the same parameters, or hold others; None where they do not."""
    return first_difference(_plain(found), _plain(wanted))


def _plain(spec: Decoder) -> Decoder:
    """Without what only decides how the same numbers are computed, in one pattern as deep as the model."""
    same = {"rules": Rules(), "communication": AllGather(), "remat": "none", "channel_chunk": None, "unroll": 1}
    same |= {"gradient_sum": "compute", "compute": "float32", "documents": 1, "periods": 1}

    def layer(one: Layer) -> Layer:
        if not isinstance(one.mixer, Attention):
            return one
        mixer = edits(one.mixer, [("cache", DenseCache()), ("backend", "auto"), ("scale", one.mixer.softmax_scale)])
        return dataclasses.replace(one, mixer=mixer)

    pattern = tuple(map(layer, spec.pattern)) * spec.periods
    rule = spec.rope
    if isinstance(rule, LengthRule):
        rule = dataclasses.replace(rule, length_policy="frozen")
    return dataclasses.replace(spec, pattern=pattern, rope=rule, **same)
