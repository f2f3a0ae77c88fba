"""What a decoder with TTT-E2E is made of: attention to a window, in forms that have a gradient of a gradient."""

from collections.abc import Iterator

from lcx.attention.mask import Window
from lcx.cache.dense import DenseCache
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.residual import InParts
from lcx.positions.length_rule import LengthRule

TWICE = ("auto", "reference")  # backends that give gradients of gradients: `auto` is `reference` where they are needed


def unfit(spec: Decoder) -> Iterator[str]:
    """A sentence for each field of a decoder that its memory, a TTTE2E, cannot be combined with."""
    memory, pattern = spec.memory, len(spec.pattern)
    beside = "beside model.memory, a TTTE2E"
    if memory.suffix % pattern or memory.suffix > spec.depth:
        yield f"model.memory.suffix = {memory.suffix}: expected a multiple of the pattern's {pattern} up to {spec.depth} layers"
    for i, layer in enumerate(spec.pattern):
        path, mixer = f"model.pattern[{i}]", layer.mixer
        if not isinstance(layer.residual, InParts):
            yield f"{path}.residual = {layer.residual}: expected a form with a place between mixer and channel {beside}"
        if not isinstance(mixer, Attention):
            yield f"{path}.mixer: expected Attention {beside}, which keeps the keys of a window"
            continue
        if not isinstance(mixer.mask, Window):
            yield f"{path}.mixer.mask = {mixer.mask}: expected a Window {beside}, which keeps the keys of one"
        if not isinstance(mixer.cache, DenseCache):
            yield f"{path}.mixer.cache = {mixer.cache}: expected a DenseCache {beside}"
        if isinstance(spec.rope_of(mixer), LengthRule):
            yield f"{path}.mixer: expected a rope that no length changes {beside}, whose keys stay as they were turned"
        if mixer.backend not in TWICE and not memory.first_order:
            expected = "expected 'auto' or 'reference', as kernels have no gradient of a gradient, or memory.first_order"
            yield f"{path}.mixer.backend = {mixer.backend!r}: {expected}"
