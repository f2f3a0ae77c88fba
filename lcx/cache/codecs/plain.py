"""Tokens as they are."""

import dataclasses

from lcx.cache.codecs.codec import Codec, Quantizer


class Whole(Quantizer):
    def loose(self, x, tables=None):
        return x

    def value(self, loose, tables=None):
        return loose


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
