"""Toy byte decoders: every published method at a scale where a CPU trains it in minutes.

Sizes follow from `width`: heads of 32 channels, a gated hidden layer of 3 width. The short convolution on the embeddings
supplies the previous-token features that so small a model would spend most of its training on. Parameters, vocabulary
included: width 96 x 3 layers 0.39 M, width 128 x 2 layers 0.46 M, width 128 x 3 layers 0.67 M.
"""

from fiddle.experimental.auto_config import auto_config

from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.positions.rope import Rope

VOCAB = 264  # 256 bytes and 3 marks, rounded up so that it divides over 8 devices


@auto_config
def toy(width: int = 128, layers: int = 2, taps: int = 4, base: float = 10_000.0) -> Decoder:
    """Attention and SwiGLU layers, pre-norm, RoPE, a tied head. base: of the rope."""
    return Decoder(
        vocab=VOCAB,
        width=width,
        pattern=(
            Layer(
                mixer=Attention(heads=width // 32, kv_heads=width // 32, head_dim=32),
                channel=GLU(hidden=3 * width),
            ),
        ),
        periods=layers,
        rope=Rope(base=base),
        unroll="all",
        embed_mixer=ShortConvolution(taps=taps),
    )
