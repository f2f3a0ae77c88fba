"""What is asked of a language model, what comes back, and the errors that refuse a request before anything runs."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lcx.inference.sampling import Sampling


class WindowOverflow(ValueError):
    """The prompt and the tokens asked for do not fit the window. Nothing was truncated."""

    def __init__(self, n_prompt: int, max_new: int, window: int):
        super().__init__(f"prompt of {n_prompt} tokens + {max_new} new ones: expected at most window = {window}")
        self.n_prompt, self.max_new, self.window = n_prompt, max_new, window


class NotFinite(ArithmeticError):
    """A model gives no numbers. found: in one clause."""

    def __init__(self, found: str):
        causes = "the weights hold some that are not, or numbers too large for model.compute"
        super().__init__(f"{found}: expected finite numbers; {causes}")


def check_finite(logprobs: Sequence[float]) -> None:
    """Raises NotFinite unless all of an answer's log-probabilities are finite."""
    for n, logprob in enumerate(logprobs):
        if not math.isfinite(logprob):
            raise NotFinite(f"log-probability {n} of the answer = {logprob}")


class Unsupported(TypeError):
    """A request that this model does not serve."""

    def __init__(self, request: object, caps: frozenset[str]):
        super().__init__(f"a request of type {type(request).__name__}: expected one of {', '.join(sorted(caps))}")


class Gen(NamedTuple):
    """Continue `prompt` by up to `max_new` tokens; the text ends before the `stop` string that is complete first."""

    prompt: str
    max_new: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    seed: int = 0


class Score(NamedTuple):
    """Log-probability of each continuation after `prompt`."""

    prompt: str
    continuations: tuple[str, ...]


class Embed(NamedTuple):
    """A vector for each text: the mean of its last hidden states, of length 1."""

    texts: tuple[str, ...]


class GenOut(NamedTuple):
    text: str
    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    n_prompt: int


class ScoreOut(NamedTuple):
    """One entry a continuation: the log-probability of each token given all before it, their sum, whether it was likeliest."""

    token_logprobs: list[list[float]]
    sums: list[float]
    greedy: list[list[bool]]
    n_prompt: int


class EmbedOut(NamedTuple):
    vectors: Float[np.ndarray, "N M"]


Request = Gen | Score | Embed
Result = GenOut | ScoreOut | EmbedOut
