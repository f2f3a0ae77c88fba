"""Tokenizers: text to ids and back."""

import abc
import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer(Spec, abc.ABC):
    """Base of every tokenizer. `size`: ids are 0 .. size - 1. `eos`: ends a document. `pad`: fills rows."""

    @property
    @abc.abstractmethod
    def size(self) -> int: ...

    @property
    @abc.abstractmethod
    def eos(self) -> int: ...

    @property
    @abc.abstractmethod
    def pad(self) -> int: ...

    @abc.abstractmethod
    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Ids of the whole text, int32. Adds no special token."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return (self.eos,)

    def prompt(self, text: str) -> Int[np.ndarray, "T"]:
        """Ids of a text that a model continues, with what it expects ahead of one."""
        return self.encode(text)

    def spans(self, text: str) -> tuple[Int[np.ndarray, "T"], list[tuple[int, int]]]:
        """`encode`, and the characters that each id is of. Raises NotImplementedError where that is not known."""
        raise NotImplementedError(f"{type(self).__name__} does not say which characters an id is of")

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens give nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, then bos 256, eos 257, pad 258. Bytes that are not UTF-8 decode to the replacement character."""

    bos = 256
    eos = 257
    pad = 258
    size = 259

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", errors="surrogatepass"), np.uint8).astype(np.int32)

    def spans(self, text):
        return self.encode(text), [(n, n + 1) for n, letter in enumerate(text) for _ in self.encode(letter)]

    def decode(self, ids):
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library. eos_token, pad_token and stop_tokens must be in its vocabulary.

    Truncation and padding that the file asks for are off. A special token spelled out in a text becomes its id. Special tokens
    that the file itself puts around a text are those of prompts. stop_tokens: others than eos_token that end an answer.
    """

    path: str
    eos_token: str
    pad_token: str | None = None
    stop_tokens: tuple[str, ...] = ()

    def validate(self):
        self.check(os.path.isfile(self.path), "path", "an existing tokenizer.json")
        try:
            _load(self.path)
        except Exception as error:  # the library raises nothing narrower
            self.fail("path", self.path, f"a tokenizer.json that loads ({error})")
        for field in ("eos_token", "pad_token"):
            token = getattr(self, field)
            known = token is None or self._loaded.token_to_id(token) is not None
            self.check(known, field, f"a token of {self.path}")
        known = all(self._loaded.token_to_id(token) is not None for token in self.stop_tokens)
        self.check(known, "stop_tokens", f"tokens of {self.path}")

    @property
    def _loaded(self):
        return _load(self.path)

    @property
    def size(self) -> int:
        return _size(self.path)

    @property
    def eos(self) -> int:
        return self._loaded.token_to_id(self.eos_token)

    @property
    def pad(self) -> int:
        return self._loaded.token_to_id(self.pad_token or self.eos_token)

    def encode(self, text):
        return np.asarray(self._loaded.encode(text, add_special_tokens=False).ids, np.int32)

    @property
    def stops(self):
        return (self.eos, *map(self._loaded.token_to_id, self.stop_tokens))

    def prompt(self, text):
        return np.asarray(self._loaded.encode(text, add_special_tokens=True).ids, np.int32)

    def spans(self, text):
        found = self._loaded.encode(text, add_special_tokens=False)
        return np.asarray(found.ids, np.int32), found.offsets

    def decode(self, ids):
        return self._loaded.decode([int(i) for i in ids], skip_special_tokens=True)


@functools.cache
def _load(path: str):
    from tokenizers import Tokenizer as Loaded

    loaded = Loaded.from_file(path)
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


@functools.cache
def _size(path: str) -> int:
    return max(_load(path).get_vocab(with_added_tokens=True).values()) + 1  # ids may leave gaps
