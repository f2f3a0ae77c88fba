"""Scorers: exact definitions, one number an answer."""

import re
import string
from collections.abc import Sequence

import numpy as np


def exact_match(given: Sequence[int] | str, reference: Sequence[int] | str) -> float:
    """1 if both are equal, else 0."""
    return float(len(given) == len(reference) and all(a == b for a, b in zip(given, reference, strict=True)))


def prefix_match(given: str, reference: str) -> float:
    """1 if `given` starts with the reference, else 0."""
    return float(given.startswith(reference))


def contains_all(given: str, references: Sequence[str]) -> float:
    """Share of the references that occur in `given`, case aside (RULER's string_match_all)."""
    return float(np.mean([reference.lower() in given.lower() for reference in references]))


def first_integer(given: str, reference: str) -> float:
    """1 if the first run of digits in `given` is the reference's integer, else 0 (YaRN's passkey score)."""
    found = re.search(r"\d+", given)
    return float(found is not None and int(found[0]) == int(reference))


def squad_normalise(text: str) -> str:
    """Lower case, punctuation and articles removed, white space collapsed, in this order (SQuAD)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def forced_exact(greedy: np.ndarray) -> float:
    """1 if every token of the answer was the model's first choice."""
    return float(np.all(greedy))


def forced_token_accuracy(greedy: np.ndarray) -> float:
    """Share of the answer's tokens that were the model's first choice."""
    return float(np.mean(greedy))


def forced_nll(logprobs: np.ndarray) -> float:
    """Mean negative log-likelihood of the answer's tokens, in nats."""
    return float(-np.mean(logprobs))
