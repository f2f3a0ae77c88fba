"""Llama shapes (Touvron et al. 2023; Llama 3, 2024): pre-norm, SwiGLU, grouped queries, an untied head, bfloat16 compute."""

from fiddle.experimental.auto_config import auto_config

from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.norms import RMSNorm
from lcx.positions.rope import Rope


@auto_config
def llama(
    width: int, layers: int, heads: int, kv_heads: int, hidden: int, vocab: int = 128256, base: float = 500000.0
) -> Decoder:
    """Heads of width / heads channels."""
    norm = RMSNorm(eps=1e-5)
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=width // heads)
    return Decoder(
        vocab=vocab,
        width=width,
        pattern=(Layer(mixer=attention, channel=GLU(hidden=hidden), norm=norm),),
        periods=layers,
        rope=Rope(base=base),
        final_norm=norm,
        head="untied",
        compute="bfloat16",
        remat="full",
    )


@auto_config
def llama2_7b(base: float = 10000.0) -> Decoder:
    """6.7 B parameters, as many key heads as query heads."""
    return llama(width=4096, layers=32, heads=32, kv_heads=32, hidden=11008, vocab=32000, base=base)


@auto_config
def llama3_8b(base: float = 500000.0) -> Decoder:
    """8.0 B parameters."""
    return llama(width=4096, layers=32, heads=32, kv_heads=8, hidden=14336, base=base)


@auto_config
def llama3_70b(base: float = 500000.0) -> Decoder:
    """70.6 B parameters."""
    return llama(width=8192, layers=80, heads=64, kv_heads=8, hidden=28672, base=base)
