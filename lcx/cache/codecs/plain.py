"""Tokens as they are."""

import dataclasses

from lcx.cache.codecs.codec import Codec, Quantizer
from pallas_kernels.quantized_attention import formats


class Whole(Quantizer):
    exact = True

    def loose(self, x, tables=None):
        return x

    def value(self, loose, tables=None):
        return loose

    def format(self, codes, tables):
        return formats.Numbers(), formats.NumberArrays(codes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Codec):
    """In the model's compute dtype."""

    @property
    def keys(self):
        return Whole()

    @property
    def values(self):
        return Whole()

    @classmethod
    def examples(cls):
        return (cls(),)
