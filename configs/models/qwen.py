"""Qwen2 shapes (2024): Llama's layers with biases on queries, keys and values, bfloat16 compute."""

from configs.models import llama
from lcx.models.decoder import Decoder
from lcx.spec import edits


def qwen2_7b(base: float = 1000000.0) -> Decoder:
    """7.6 B parameters; 4 key heads for 28 query heads."""
    shape = llama.llama(width=3584, layers=28, heads=28, kv_heads=4, hidden=18944, vocab=152064, base=base)
    return edits(shape, [("pattern[0].mixer.bias", "qkv")])
