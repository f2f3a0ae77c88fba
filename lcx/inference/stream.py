"""Generation one token at a time, for a reader who waits: the tokens of `generate`, as they come."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lcx.data.tokenizers import Tokenizer
from lcx.inference.decoding import checked_seed
from lcx.inference.reading import feed, prefill
from lcx.inference.sampling import Sampling
from lcx.models.decoder import DecoderModel, settled


def stream(
    model: DecoderModel,
    prompt: Sequence[int],
    *,
    max_new: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[int] = (),
    chunk: int = 512,
) -> Iterator[int]:
    """Up to `max_new` tokens after the prompt, ended by any id of `stop`; the arguments are those of `generate`."""
    if max_new < 1 or len(prompt) == 0:
        raise ValueError(f"stream: max_new = {max_new}, prompt of {len(prompt)} tokens: expected at least one token of each")
    model = settled(model)
    read = prefill(model, [prompt], 1, max_new, chunk)
    key = jax.random.key(checked_seed(seed))
    for n in range(max_new):
        token = int(_choose(model, read.last, key, jnp.int32(n), sampling)[0])
        if token in stop:
            return
        yield token
        read = feed(model, np.full((1, 1), token, np.int32), np.ones((1, 1), np.int32), read)


def text_of(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of a stream of ids, in pieces; a character of several tokens comes when it is whole."""
    taken, shown = [], ""
    for token in ids:
        taken.append(token)
        text = tokenizer.decode(taken)
        held = min(len(text) - len(text.rstrip("\ufffd")), 3)  # the bytes of a character that may still be completed
        whole = text[: len(text) - held]
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
    rest = tokenizer.decode(taken)[len(shown) :]
    if rest:
        yield rest


@functools.partial(jax.jit, static_argnames="sampling")
def _choose(
    model: DecoderModel, last: Float[Array, "B M"], key: Key[Array, ""], n: Int[Array, ""], sampling: Sampling
) -> Int[Array, "B"]:
    return sampling.choose(model.logits(last), jax.random.fold_in(key, n)[None])
