"""Generation one token at a time, for a reader who waits: the tokens of `generate`, as they come."""

from collections.abc import Iterable, Iterator, Sequence

from jax.sharding import Mesh

from lcx.data.tokenizers import Tokenizer
from lcx.inference.engine import Ask, Engine
from lcx.inference.requests import check_finite
from lcx.inference.sampling import Sampling
from lcx.inference.text import Unfolding
from lcx.models.decoder import DecoderModel


def stream(
    model: DecoderModel,
    prompt: Sequence[int],
    *,
    max_new: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[int] = (),
    chunk: int = 512,
    mesh: Mesh | None = None,
) -> Iterator[int]:
    """Up to `max_new` tokens after the prompt, ended by any id of `stop`; the arguments are those of `generate`.
    mesh: see `Engine`. Raises NotFinite for a model that gives no numbers, CacheOverflow as `generate`."""
    engine = Engine(model, window=max(1, len(prompt) + max_new), rows=1, chunk=chunk, burst=1, mesh=mesh)
    for piece in engine.run([Ask(prompt, max_new, sampling, seed, stop)]):
        check_finite(piece.logprobs)
        yield from piece.ids


def text_of(ids: Iterable[int], tokenizer: Tokenizer, stops: Sequence[str] = ()) -> Iterator[str]:
    """The text of a stream of ids, in pieces; a character of several tokens comes when it is whole. It ends before the stop
    string that is whole first."""
    text = Unfolding(tokenizer, stops)
    for token in ids:
        if piece := text.add([token]):
            yield piece
        if text.stopped:
            return
    if piece := text.end():
        yield piece
