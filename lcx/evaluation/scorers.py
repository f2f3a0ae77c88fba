"""Scorers: exact definitions, one number an answer."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float


def exact_match(given: Sequence[int] | str, reference: Sequence[int] | str) -> float:
    """1 if both are equal, else 0."""
    return float(len(given) == len(reference) and all(a == b for a, b in zip(given, reference, strict=True)))


def prefix_match(given: Sequence[int] | str, reference: Sequence[int] | str) -> float:
    """1 if `given` starts with the reference, else 0. Of greedily generated tokens this is `forced_exact`."""
    return exact_match(given[: len(reference)], reference)


def first_integer(given: str, reference: str) -> float:
    """1 if the first run of digits in `given` is the reference's integer, else 0 (YaRN's passkey score)."""
    found = re.search(r"[0-9]+", given)
    return float(found is not None and int(found[0]) == int(reference))


def forced_exact(greedy: Bool[np.ndarray, "N"]) -> float:
    """1 if every token of the answer was the model's first choice."""
    return float(np.all(greedy))


def forced_token_accuracy(greedy: Bool[np.ndarray, "N"]) -> float:
    """Share of the answer's tokens that were the model's first choice."""
    return float(np.mean(greedy))


def forced_nll(logprobs: Float[np.ndarray, "N"]) -> float:
    """Mean negative log-likelihood of the answer's tokens, in nats."""
    return float(-np.mean(logprobs, dtype=np.float64))
